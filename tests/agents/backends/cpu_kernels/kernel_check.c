/* A forward pass, a backward pass and a step of random small networks by the kernels, each stage beside its plain loop.
 *
 * kernel_check SEEDS [THREADS]: prints the first difference and ends with 1, or says how many networks agreed. For
 * where there is no Python or torch: another processor's emulator, and sanitizers, since every array has its exact
 * size.
 * Compile with the sources of csrc but reference.c, which is included here, and with -I csrc.
 */
#include <stdio.h>
#include <stdlib.h>
#include "kernels.h"
#include "reference.c"
#include "scalar.h"

int64_t supports_precision(int64_t precision);
int64_t has_tile_unit(void);
void pack_layers(const TrainedLayer *layers, int64_t count, int64_t threads);
void network_forward(const NetworkShape *shape, const ForwardArgs *passes, int64_t count, uint8_t *workspace,
                     int64_t threads);
void network_backward_and_step(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                               const TrainedLayer *layers, uint8_t *workspace, int64_t threads,
                               const OptimizerStep *step);

#define MAX_LAYERS (MAX_CONVOLUTIONS + 2)
#define MAX_ARRAYS 512
static const double STEP_SIZE = 0.01, BETA1 = 0.9, BETA2 = 0.99, EPS = 0.05; /* so large that a step is no sign */

static NetworkShape shape;
static int64_t precision, pair, batch, seed, threads = 2;
static TrainedLayer layers[MAX_LAYERS];
static float *weights[MAX_LAYERS], *biases[MAX_LAYERS]; /* before the step: convolutions (k, units), dense (units, k) */
static double *directions[MAX_LAYERS], *scales[MAX_LAYERS]; /* v and g before the step */
static void *arrays[MAX_ARRAYS];
static int array_count;
static uint64_t state;

static uint64_t random_bits(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull >> 32;
}
static int64_t random_below(int64_t count) { return (int64_t)(random_bits() % (uint64_t)count); }
static float random_float(void) { return (float)((double)random_bits() / 2147483648.0 - 1.0); } /* -1 to 1 */

/* Memory for this network, not zero: what is read before it is written shows. */
static void *array(int64_t bytes) {
    if (array_count == MAX_ARRAYS) exit(2);
    void *made = malloc(bytes ? bytes : 1);
    if (!made) exit(2);
    memset(made, 0x5a, bytes);
    return arrays[array_count++] = made;
}
/* The same with zeros behind it. */
static void *array_and_zeros(int64_t bytes, int64_t zeros) {
    uint8_t *made = array(bytes + zeros);
    memset(made + bytes, 0, zeros);
    return made;
}
static float *floats(int64_t count) { return array(count * 4); }
static double *doubles(int64_t count) { return array(count * 8); }
static float *random_floats(int64_t count, float size) {
    float *made = floats(count);
    FOR(i, count) made[i] = size * random_float();
    return made;
}
static float *zero_floats(int64_t count) { return memset(floats(count), 0, count * 4); }

static float element(const void *elements, int64_t i) {
    return precision == BFLOAT16 ? from_bfloat16(((const uint16_t *)elements)[i]) : ((const float *)elements)[i];
}
/* Words (batch / pair, size) that pair observations as (batch, size). */
static float *unpaired(const void *words, int64_t size) {
    float *made = floats(batch * size);
    FOR(n, batch) FOR(i, size) made[n * size + i] = element(words, (n / pair * size + i) * pair + n % pair);
    return made;
}
/* Elements of the hidden layer's input, (batch, channels, positions), as (batch, positions, channels). */
static float *channels_last(const float *flat, int64_t positions, int64_t channels) {
    float *made = floats(batch * positions * channels);
    FOR(n, batch) FOR(u, channels) FOR(p, positions)
        made[(n * positions + p) * channels + u] = flat[(n * channels + u) * positions + p];
    return made;
}

static void fail(const char *stage, int64_t layer, int64_t i, double found, double expected) {
    printf("seed %lld, %s, layer %lld: number %lld is %.9g, not %.9g\n", (long long)seed, stage, (long long)layer,
           (long long)i, found, expected);
    exit(1);
}

/* Equal in float32 where `exact`, up to the sign of a zero; otherwise within rounding. */
static void compare(const char *stage, int64_t layer, const float *found, const float *expected, int64_t count,
                    int exact) {
    double largest = 1e-30;
    FOR(i, count) largest = fmax(largest, fabs((double)expected[i]));
    const double relative = precision == BFLOAT16 ? 1.0 / 256 : 1e-5, absolute = precision == BFLOAT16 ? 2e-5 : 1e-5;
    FOR(i, count) {
        const double error = fabs((double)found[i] - expected[i]);
        const double bound = relative * fabs((double)expected[i]) + absolute * largest;
        if (!(exact && precision == FLOAT32 ? found[i] == expected[i] : error <= bound))
            fail(stage, layer, i, found[i], expected[i]);
    }
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t whole_tiles(int64_t count) { return (count + 15) / 16 * 16; }

/* Columns of a layer's transposed gradient, in all lines or in one. */
static int64_t transposed_columns(const ConvShape *conv, int64_t all) {
    if (conv->stride == 1) return whole_tiles((conv->out_height - 1) * conv->in_width + conv->out_width);
    return whole_tiles(conv->out_width) * (all ? conv->out_height : 1);
}

/* Some of the stages that layouts.tile_stages names, and what they take of the workspace, in bytes. */
static int64_t draw_tiles(void) {
    int64_t stages = 63, bytes = larger(16 * shape.flat * 4, (shape.hidden + 31) / 32 * 16 * 32 * 4), past = 0;
    FOR(l, shape.convolutions) {
        const ConvShape *conv = &shape.convolution[l];
        if (conv->kernel * conv->in_channels % 32) stages &= ~TILE_CONV_FORWARD;
        if (l && conv->kernel / conv->stride * conv->out_channels % 32) stages &= ~TILE_CONV_INPUT;
        bytes = larger(bytes, conv->kernel * conv->in_channels * conv->out_channels * 4);
        past = larger(past, 16 * conv->stride * conv->in_channels * 2);
        shape.transposed_columns[l] = transposed_columns(conv, 0);
    }
    shape.tiles = random_below(2) ? stages : stages & random_below(64);
    return larger(bytes, 2 * 32 * 32 * 4 + shape.max_activation * 12 + past);
}

/* A random shape that layouts.unsupported has nothing against, and the sizes that layouts.network_shape works out. */
static void draw_shape(void) {
    static const int64_t first_units[] = {16, 32, 48}, more_units[] = {16, 64, 80}, blocks[] = {2, 4, 4, 8};
    for (;;) {
        shape = (NetworkShape){.precision = precision, .frames = 1 + random_below(5), .block = blocks[random_below(4)]};
        shape.convolutions = 1 + random_below(3);
        int64_t height = 4 + random_below(6), width = 4 + random_below(14), fits = 1;
        int64_t channels = shape.frames * shape.block * shape.block;
        FOR(l, shape.convolutions) {
            ConvShape *conv = &shape.convolution[l];
            const int64_t units = l ? more_units[random_below(3)] : first_units[random_below(3)];
            int64_t kernel, stride, tries = 30;
            do {
                kernel = 1 + random_below(l ? 4 : 2), stride = 1 + (l ? random_below(3) > 0 : 0);
                fits = kernel <= smaller(height, width) && channels % 16 == 0 && kernel % stride == 0;
                fits &= !l || (height % stride == 0 && width % stride == 0);
                fits &= !l || ((height - kernel) % stride == 0 && (width - kernel) % stride == 0);
            } while (!fits && --tries);
            *conv = (ConvShape){height, width, channels, kernel, stride, 0, 0, units};
            if (!fits) break;
            height = conv->out_height = (height - kernel) / stride + 1;
            width = conv->out_width = (width - kernel) / stride + 1;
            channels = units;
        }
        shape.flat = height * width * channels;
        if (fits && shape.flat % 32 == 0) break;
    }
    shape.hidden = random_below(2) ? 16 : 48;
    shape.actions = 1 + random_below(6);
    int64_t bytes = 8 * shape.flat * 4, positions = 0;
    bytes = larger(bytes, shape.hidden / pair * 32 * 4);
    FOR(l, shape.convolutions) {
        const ConvShape *conv = &shape.convolution[l];
        const int64_t border = l ? conv->kernel / conv->stride - 1 : 0;
        const int64_t area = (conv->out_height + 2 * border) * (conv->out_width + 2 * border) * conv->out_channels;
        shape.max_activation = larger(shape.max_activation, area);
        shape.max_activation =
            larger(shape.max_activation, conv->in_height * conv->in_width * conv->in_channels);
        positions = larger(positions, conv->out_height * conv->out_width);
        bytes = larger(bytes, (2 * 16 + 1) * conv->kernel * conv->kernel * conv->in_channels * 4);
    }
    shape.max_positions = 2 * positions + 12;
    bytes = larger(bytes, 6 * shape.max_activation * 4 + 16 * shape.max_positions);
    if (precision == BFLOAT16 && has_tile_unit()) bytes = larger(bytes, draw_tiles());
    shape.workspace_bytes = (bytes + 63) / 64 * 64;
}

/* Of input `k` of a convolution in the order (kernel, kernel, channels), its place in v: (channels, kernel, kernel). */
static int64_t place_in_v(const ConvShape *conv, int64_t k) {
    return k % conv->in_channels * conv->kernel * conv->kernel + k / conv->in_channels;
}

/* Where element (unit, k) of a layer's packed weight lies. */
static int64_t packed_place(int64_t l, int64_t unit, int64_t k) {
    if (l >= shape.convolutions) return unit * layers[l].inputs + k;
    return (k / pair * layers[l].units + unit) * pair + k % pair;
}

/* What is trained, and where packed weights and gradients lie. */
static void draw_layer(int64_t l) {
    const int64_t is_conv = l < shape.convolutions, is_hidden = l == shape.convolutions;
    const ConvShape *conv = is_conv ? &shape.convolution[l] : NULL;
    TrainedLayer *layer = &layers[l];
    *layer = (TrainedLayer){.units = is_conv ? conv->out_channels : is_hidden ? shape.hidden : shape.actions,
                            .inputs = is_conv     ? conv->kernel * conv->kernel * conv->in_channels
                                      : is_hidden ? shape.flat
                                                  : shape.hidden};
    const int64_t units = layer->units, inputs = layer->inputs, count = units * inputs;
    layer->packed_bfloat16 = precision == BFLOAT16 && (is_conv || is_hidden);
    layer->weight_kind = random_below(2) ? WEIGHT_NORM : WEIGHT_PLAIN;
    layer->input_scale = l ? 1.0f : 1.0f / 255.0f;
    layer->packed_unit_stride = layer->gradient_unit_stride = inputs;
    layer->v = random_floats(count, 2.0f / sqrtf((float)inputs));
    layer->g = random_floats(units, 1.0f);
    layer->b = random_floats(units, 0.1f);
    layer->v_moment1 = zero_floats(count), layer->v_moment2 = zero_floats(count);
    layer->g_moment1 = zero_floats(units), layer->g_moment2 = zero_floats(units);
    layer->b_moment1 = zero_floats(units), layer->b_moment2 = zero_floats(units);
    layer->g_gradient = floats(units), layer->norm = floats(units);
    layer->row_factor = floats(units), layer->v_factor = floats(units);
    layer->packed = array(count * (layer->packed_bfloat16 ? 2 : 4));
    layer->bias_gradient = floats(units);
    if (!is_hidden) layer->packed_gradient = floats(count), layer->v_gradient = floats(count);
    directions[l] = doubles(count), scales[l] = doubles(units);
    FOR(i, count) directions[l][i] = layer->v[i];
    FOR(u, units) scales[l][u] = layer->g[u];
    if (!is_conv) return;
    int32_t *packed = array(inputs * 4), *gradient = array(inputs * 4), *transposed = array(inputs * 4);
    FOR(k, inputs) {
        const int64_t y = k / conv->in_channels / conv->kernel, x = k / conv->in_channels % conv->kernel;
        const int64_t s = conv->stride, taps = conv->kernel / s, i = place_in_v(conv, k);
        const int64_t tap = (taps - 1 - y / s) * taps + taps - 1 - x / s;
        packed[i] = (int32_t)packed_place(l, 0, k);
        gradient[i] = (int32_t)(k * units);
        transposed[i] = (int32_t)(((y % s * s + x % s) * taps * taps + tap) * units * conv->in_channels +
                                  k % conv->in_channels * pair);
    }
    layer->packed_unit_stride = pair, layer->gradient_unit_stride = 1;
    layer->packed_offset = packed, layer->gradient_offset = gradient;
    if (l == 0) return;
    layer->transposed_offset = transposed;
    layer->transposed = array(count * (precision == BFLOAT16 ? 2 : 4));
    layer->transposed_unit_stride = conv->in_channels * pair, layer->transposed_pair = pair;
}

/* Whether a layer's packed weights are those of its v and g; returns them, as weights[l]. */
static float *check_packed(int64_t l) {
    const TrainedLayer *layer = &layers[l];
    const int64_t is_conv = l < shape.convolutions, units = layer->units, inputs = layer->inputs;
    float *made = floats(units * inputs), *expected = floats(units * inputs);
    FOR(u, units) {
        const float *v = layer->v + u * inputs;
        double square = 0.0;
        FOR(i, inputs) square += (double)v[i] * v[i];
        const double factor = layer->weight_kind == WEIGHT_NORM ? layer->g[u] / sqrt(square) : 1.0;
        FOR(k, inputs) {
            const int64_t at = is_conv ? k * units + u : u * inputs + k, place = packed_place(l, u, k);
            const int64_t input = is_conv ? place_in_v(&shape.convolution[l], k) : k;
            made[at] = layer->packed_bfloat16 ? from_bfloat16(((const uint16_t *)layer->packed)[place])
                                              : ((const float *)layer->packed)[place];
            expected[at] = (float)(v[input] * factor * layer->input_scale);
            if (!layer->transposed) continue;
            const int64_t from = layer->transposed_offset[input] + u / pair * layer->transposed_unit_stride + u % pair;
            const float other = element(layer->transposed, from);
            if (other != made[at]) fail("transposed weight", l, at, other, made[at]);
        }
    }
    compare("packed weight", l, made, expected, units * inputs, 0);
    return made;
}

/* The parameters of a layer after the first step; dw (units, k) is the gradient by the packed weight. */
static void check_step(int64_t l, const float *dw) {
    const TrainedLayer *layer = &layers[l];
    const int64_t inputs = layer->inputs;
    double *row = doubles(inputs), *m = doubles(inputs + 1), *moment = doubles(inputs + 1);
    FOR(u, layer->units) {
        double *v = directions[l] + u * inputs, *g = layer->weight_kind == WEIGHT_NORM ? scales[l] + u : NULL;
        FOR(k, inputs) {
            const int64_t input = l < shape.convolutions ? place_in_v(&shape.convolution[l], k) : k;
            row[input] = (double)dw[u * inputs + k] * layer->input_scale;
        }
        memset(m, 0, (inputs + 1) * 8), memset(moment, 0, (inputs + 1) * 8);
        reference_step(inputs, row, v, g, m, moment, STEP_SIZE, BETA1, BETA2, EPS);
        FOR(i, inputs) {
            const double found = layer->v[u * inputs + i];
            if (!(fabs(found - v[i]) <= 1e-3 * STEP_SIZE)) fail("step of v", l, u * inputs + i, found, v[i]);
        }
        if (g && !(fabs(layer->g[u] - *g) <= 1e-3 * STEP_SIZE)) fail("step of g", l, u, layer->g[u], *g);
    }
}

static void check_network(void) {
    batch = 1 + random_below(random_below(4) ? 9 : 40);
    draw_shape();
    const int64_t depth = shape.convolutions, groups = (batch + pair - 1) / pair;
    FOR(l, depth + 2) draw_layer(l);
    pack_layers(layers, depth + 2, threads);
    FOR(l, depth + 2) {
        weights[l] = check_packed(l);
        biases[l] = memcpy(floats(layers[l].units), layers[l].b, layers[l].units * 4);
    }

    /* Frames of which many blocks are zero; observations share them. */
    const ConvShape *first = &shape.convolution[0];
    const int64_t height = first->in_height * shape.block, width = first->in_width * shape.block, stored = batch + 3;
    uint8_t *frames = array(stored * height * width);
    const int64_t lit = (int64_t)1 << random_below(5); /* of 16 blocks */
    FOR(f, stored) FOR(y, first->in_height) FOR(x, first->in_width) {
        const int64_t some = random_below(16) < lit;
        FOR(i, shape.block) FOR(j, shape.block)
            frames[(f * height + y * shape.block + i) * width + x * shape.block + j] =
                some ? (uint8_t)random_below(256) : 0;
    }
    int64_t *indices = array(batch * (shape.frames + 1) * 8);
    uint8_t *observations = array(batch * shape.frames * height * width);
    FOR(n, batch) FOR(f, shape.frames) {
        const int64_t frame = indices[n * (shape.frames + 1) + f] = random_below(stored);
        memcpy(observations + (n * shape.frames + f) * height * width, frames + frame * height * width, height * width);
    }

    ForwardArgs args = {.frames = frames, .frame_indices = indices, .frame_index_stride = shape.frames + 1,
                        .batch = batch};
    BackwardArgs back = {.q_gradient = random_floats(batch * shape.actions, 1.0f)};
    FOR(l, depth) {
        const ConvShape *conv = &shape.convolution[l];
        args.conv_weight[l] = layers[l].packed, args.conv_bias[l] = layers[l].b;
        args.saved_input[l] = array_and_zeros(groups * conv->in_height * conv->in_width * conv->in_channels * 4,
                                              shape.tiles ? 16 * conv->stride * conv->in_channels * 4 : 0);
        if (shape.tiles & TILE_CONV_WEIGHT)
            back.transposed_gradient[l] = array(groups * conv->out_channels * transposed_columns(conv, 1) * 4);
        back.transposed_weight[l] = layers[l].transposed;
        back.conv_gradient[l] = array(groups * conv->out_height * conv->out_width * conv->out_channels * 4);
        back.weight_gradient[l] = layers[l].packed_gradient, back.bias_gradient[l] = layers[l].bias_gradient;
    }
    args.hidden_weight = layers[depth].packed, args.hidden_bias = layers[depth].b;
    args.output_weight = layers[depth + 1].packed, args.output_bias = layers[depth + 1].b;
    args.nonzero_blocks = array(groups * first->in_height * 8);
    args.flat = array(batch * shape.flat * 4 / pair);
    const int64_t rows = shape.tiles ? whole_tiles(batch) : batch;
    const int64_t more_groups = shape.tiles ? whole_tiles(groups) - groups : 0;
    args.saved_input[depth] =
        pair == 1 ? args.flat : array_and_zeros(groups * shape.flat * 4, more_groups * shape.flat * 4);
    if (shape.tiles) args.flat_columns = array(shape.flat / 2 * rows * 4);
    args.hidden = floats(batch * shape.hidden), args.q_values = floats(batch * shape.actions);
    back.hidden_gradient = array(rows * shape.hidden * 4 / pair + (shape.tiles ? 16 * 2 : 0));
    back.hidden_gradient_pairs = array(groups * shape.hidden * 4);
    back.flat_gradient = floats(rows * shape.flat);
    uint8_t *workspace = array(threads * shape.workspace_bytes);
    network_forward(&shape, &args, 1, workspace, threads);

    /* Forward. */
    const int64_t area = first->in_height * first->in_width, channels = first->in_channels;
    float *blocks = floats(batch * area * channels), *inputs[MAX_LAYERS];
    uint64_t *nonzero = array(batch * first->in_height * 8);
    reference_pack_frames(observations, batch, shape.frames, height, width, shape.block, blocks);
    reference_nonzero_blocks(first, batch, blocks, nonzero);
    inputs[0] = unpaired(args.saved_input[0], area * channels);
    FOR(n, batch) FOR(y, first->in_height) {
        const int64_t row = n * first->in_height + y, other = n % 2 ? n - 1 : n + 1;
        uint64_t expected = nonzero[row];
        if (pair == 2 && other < batch) expected |= nonzero[other * first->in_height + y];
        const uint64_t found = args.nonzero_blocks[n / pair * first->in_height + y];
        if (found != expected) fail("nonzero blocks", 0, row, (double)found, (double)expected);
        FOR(x, first->in_width) if (!(found >> x & 1)) /* is not written */
            memset(inputs[0] + (row * first->in_width + x) * channels, 0, channels * 4);
    }
    compare("blocks", 0, inputs[0], blocks, batch * area * channels, 1);
    float *flat = floats(batch * shape.flat), *hidden = floats(batch * shape.hidden);
    FOR(i, batch * shape.flat) flat[i] = element(args.flat, i);
    FOR(l, depth) {
        const ConvShape *conv = &shape.convolution[l];
        const int64_t positions = conv->out_height * conv->out_width, size = positions * conv->out_channels;
        float *expected = floats(batch * size);
        reference_conv_forward(conv, batch, inputs[l], weights[l], biases[l], expected);
        inputs[l + 1] = l == depth - 1 ? channels_last(flat, positions, conv->out_channels)
                                       : unpaired(args.saved_input[l + 1], size);
        compare("conv_forward", l, inputs[l + 1], expected, batch * size, 1);
    }
    compare("saved flat", depth, unpaired(args.saved_input[depth], shape.flat), flat, batch * shape.flat, 1);
    reference_dense_forward(batch, shape.flat, shape.hidden, flat, weights[depth], biases[depth], 1, hidden);
    compare("hidden_forward", depth, args.hidden, hidden, batch * shape.hidden, 0);
    float *q_values = floats(batch * shape.actions);
    reference_dense_forward(batch, shape.hidden, shape.actions, args.hidden, weights[depth + 1], biases[depth + 1], 0,
                            q_values);
    compare("output_forward", depth + 1, args.q_values, q_values, batch * shape.actions, 0);

    /* Backward, and the step. */
    const OptimizerStep step = {ADAMAX, (float)STEP_SIZE, (float)BETA1, (float)BETA2, (float)EPS, 1.0f};
    network_backward_and_step(&shape, &args, &back, layers, workspace, threads, &step);
    float *found = floats(batch * shape.hidden), *expected = floats(batch * shape.hidden);
    FOR(i, batch * shape.hidden) found[i] = element(back.hidden_gradient, i);
    reference_dense_input_backward(batch, shape.hidden, shape.actions, back.q_gradient, weights[depth + 1],
                                   args.hidden, expected);
    compare("hidden_backward", depth, found, expected, batch * shape.hidden, 1);
    compare("its pairs", depth, unpaired(back.hidden_gradient_pairs, shape.hidden), found, batch * shape.hidden, 1);
    float *dflat = floats(batch * shape.flat);
    reference_dense_input_backward(batch, shape.flat, shape.hidden, found, weights[depth], NULL, dflat);
    compare("flat_backward", depth, back.flat_gradient, dflat, batch * shape.flat, 1);
    FOR(i, batch * shape.flat) dflat[i] = flat[i] != 0.0f ? back.flat_gradient[i] : 0.0f;
    for (int64_t l = depth - 1; l >= 0; l--) {
        const ConvShape *conv = &shape.convolution[l];
        const int64_t positions = conv->out_height * conv->out_width, units = conv->out_channels;
        const int64_t size = conv->in_height * conv->in_width * conv->in_channels, count = layers[l].inputs * units;
        float *dy = unpaired(back.conv_gradient[l], positions * units);
        if (l == depth - 1)
            compare("ReLU", l, dy, channels_last(dflat, positions, units), batch * positions * units, 1);
        if (l) {
            const ConvShape *below = &shape.convolution[l - 1];
            float *dx = floats(batch * size);
            reference_conv_input_backward(conv, batch, dy, weights[l], inputs[l], dx);
            const int64_t below_size = below->out_height * below->out_width * below->out_channels;
            float *own = unpaired(back.conv_gradient[l - 1], below_size);
            compare("conv_input_backward", l, own, dx, batch * size, 1);
        }
        float *dw = floats(count), *db = floats(units), *rows = floats(count);
        reference_conv_weight_backward(conv, batch, dy, inputs[l], dw, db);
        compare("conv_weight_backward", l, back.weight_gradient[l], dw, count, 1);
        compare("its bias", l, back.bias_gradient[l], db, units, 1);
        FOR(u, units) FOR(k, layers[l].inputs) rows[u * layers[l].inputs + k] = back.weight_gradient[l][k * units + u];
        check_step(l, rows);
    }
    float *dw = floats(shape.hidden * shape.flat), *db = floats(shape.hidden);
    reference_dense_weight_backward(batch, shape.flat, shape.hidden, found, flat, dw, db);
    compare("bias of hidden_weight_step", depth, layers[depth].bias_gradient, db, shape.hidden, 0);
    check_step(depth, dw);
    dw = floats(shape.actions * shape.hidden), db = floats(shape.actions);
    reference_dense_weight_backward(batch, shape.hidden, shape.actions, back.q_gradient, args.hidden, dw, db);
    compare("bias of output_backward", depth + 1, layers[depth + 1].bias_gradient, db, shape.actions, 0);
    check_step(depth + 1, dw);
    FOR(l, depth + 2) check_packed(l);
}

int main(int count, char **words) {
    const int64_t seeds = count > 1 ? atoll(words[1]) : 10;
    int64_t checked = 0;
    if (count > 2) threads = atoll(words[2]);
    for (precision = FLOAT32; precision <= BFLOAT16; precision++) {
        if (!supports_precision(precision)) continue;
        pair = precision == BFLOAT16 ? 2 : 1;
        for (seed = 0; seed < seeds; seed++, checked++) {
            state = 0x9e3779b97f4a7c15ull * (uint64_t)(seed + 1);
            check_network();
            while (array_count) free(arrays[--array_count]);
        }
    }
    printf("%lld networks agree with their plain loops\n", (long long)checked);
    return checked ? 0 : 1;
}
