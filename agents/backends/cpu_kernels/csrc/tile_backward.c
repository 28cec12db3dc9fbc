/* The backward pass on the tile unit: the products of dense_backward.c, conv_input_backward.c and conv_weight_backward.c.
 *
 * A weight's gradient is a sum over observations and positions, and one factor of a product has to lie with what is
 * summed over in its rows: the gradients by a layer's sums are transposed, which are fewer than its inputs.
 */
#include "tiles.h"
#ifdef TILE_KERNELS

/* Two rows of 32 elements as words that pair them. */
ALWAYS_INLINE void interleave_rows(const uint16_t *first, const uint16_t *second, int32_t *words) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    for (int half = 0; half < 2; half++) {
        const __m512i low = _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a));
        const __m512i high = _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(b, 1) : _mm512_castsi512_si256(b));
        _mm512_storeu_si512(words + 16 * half, pair_words(low, high));
    }
}

/* 16 * a_tiles observations of tile_flat_backward. */
ALWAYS_INLINE void flat_sums(const int a_tiles, const int b_tiles, const uint16_t *gradient, int64_t hidden,
                             const int32_t *weight, int64_t steps, float *out, int64_t flat) {
    zero_sums(a_tiles, b_tiles);
    add_products(a_tiles, b_tiles, gradient, hidden * 2, 64, weight, 128, 16 * 128, steps);
    store_sums(a_tiles, b_tiles, out, flat * 4);
}

/* The gradient by the hidden layer's inputs [first, first + 32) for all observations:
 * for n, k: flat_gradient[n][k] = sum over u: hidden_gradient[n][u] * hidden_weight[u][k]
 * The weights are paired by units in the workspace first. `next` is the input that this thread probably takes
 * afterwards, whose weights, one cache line in each row, are prefetched. Both gradients have memory for whole tiles of
 * observations. */
void tile_flat_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t first,
                        int64_t next, uint8_t *workspace) {
    const int64_t hidden = shape->hidden, flat = shape->flat, steps = (hidden + 31) / 32;
    const uint16_t *weight = (const uint16_t *)args->hidden_weight + first;
    const uint16_t *ahead = (const uint16_t *)args->hidden_weight + (next < flat ? next : first);
    int32_t *words = (int32_t *)workspace;
    for (int64_t u = 0; u < hidden; u += 2) {
        interleave_rows(weight + u * flat, weight + (u + 1) * flat, words + u / 2 * 32);
        __builtin_prefetch(ahead + u * flat, 0, 2);
        __builtin_prefetch(ahead + (u + 1) * flat, 0, 2);
    }
    memset(words + hidden / 2 * 32, 0, (steps * 16 - hidden / 2) * 128); /* of the last step */
    for (int64_t n = 0; n < args->batch; n += 32) {
        const uint16_t *gradient = (const uint16_t *)back->hidden_gradient + n * hidden;
        float *out = back->flat_gradient + n * flat + first;
        if (tiles_of(args->batch - n) == 2)
            flat_sums(2, 2, gradient, hidden, words, steps, out, flat);
        else
            flat_sums(1, 2, gradient, hidden, words, steps, out, flat);
    }
}

/* The gradient of the hidden layer's units [first, first + 16), and at once their step, as hidden_weight_step:
 * for u, k: rows[u][k] = sum over n: hidden_gradient[n][first + u] * flat[n][k]
 * The saved input has memory for whole steps of 32 observations, zero after the last. */
void tile_hidden_weight_step(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                             const TrainedLayer *layer, int64_t first, float *rows, const OptimizerStep *step) {
    const int64_t groups = (args->batch + 1) / 2, steps = (groups + 15) / 16, flat = shape->flat, hidden = shape->hidden;
    const int32_t *saved = args->saved_input[shape->convolutions];
    int32_t gradient[steps][16][16]; /* the units' gradients: for each step (unit, group) */
    for (int64_t s = 0; s < steps; s++) {
        const int32_t *of[16];
        for (int64_t i = 0; i < 16; i++) {
            const int64_t group = 16 * s + i;
            of[i] = group < groups ? back->hidden_gradient_pairs + group * hidden + first : NULL;
        }
        Floats block[16][VECTORS];
        load_transposed(of, block);
        for (int u = 0; u < 16; u++) store_floats(gradient[s][u], block[u][0]);
    }
    for (int64_t k = 0; k < flat; k += 32) {
        zero_sums(1, 2);
        add_products(1, 2, gradient, 64, sizeof gradient[0], saved + k, flat * 4, flat * 64, steps);
        store_sums(1, 2, rows + k, flat * 4);
    }
    for (int64_t u = 0; u < 16; u++) {
        float sum = 0.0f;
        for (int64_t n = 0; n < args->batch; n++)
            sum += from_bfloat16(((const uint16_t *)back->hidden_gradient)[n * hidden + first + u]);
        if (!args->normalization[shape->convolutions]) ((float *)layer->bias_gradient)[first + u] = sum;
        step_and_pack_unit(layer, first + u, rows + u * flat, step);
    }
}

/* 16 * a_tiles positions and 16 * b_tiles channels of tile_convolve. */
ALWAYS_INLINE void window_sums(const int a_tiles, const int b_tiles, const uint16_t *in, int64_t x_stride, int64_t rows,
                               int64_t row_stride, int64_t steps, const int32_t *weight, int64_t channels,
                               float *sums) {
    zero_sums(a_tiles, b_tiles);
    for (int64_t i = 0; i < rows; i++)
        add_products(a_tiles, b_tiles, in + i * row_stride, x_stride * 2, 64, weight + i * steps * 16 * channels,
                     channels * 4, channels * 64, steps);
    store_sums(a_tiles, b_tiles, sums, 128);
}

/* A convolution of stride 1 over elements: position (y, x) is at (y * line + x) * x_stride, and has `rows` rows of
 * row_elements elements (a multiple of 32), row_stride apart; the weight is words (rows, row_elements / 2, channels):
 * for y < height, x < width, c: out[y][x][c] =
 *     sum over i, k: in[(y * line + x) * x_stride + i * row_stride + k] * weight[i][k][c] */
void tile_convolve(const uint16_t *in, int64_t x_stride, int64_t line, int64_t height, int64_t width, int64_t rows,
                   int64_t row_stride, int64_t row_elements, const int32_t *weight, int64_t channels, float *out) {
    const int64_t positions = (height - 1) * line + width, steps = row_elements / 32;
    float sums[32 * 32];
    for (int64_t c = 0; c < channels; c += 32) {
        const int b_tiles = tiles_of(channels - c);
        int64_t y = 0, x = 0;
        for (int64_t p = 0; p < positions; p += 32) {
            const int a_tiles = tiles_of(positions - p);
            DISPATCH_TILES(a_tiles, b_tiles, window_sums, in + p * x_stride, x_stride, rows, row_stride, steps,
                           weight + c, channels, sums);
            for (int64_t i = 0; i < 32 && p + i < positions; i++) {
                if (x < width) {
                    float *to = out + (y * width + x) * channels + c;
                    for (int v = 0; v < b_tiles; v++) store_floats(to + 16 * v, load_floats(sums + 32 * i + 16 * v));
                }
                if (++x == line) x = 0, y++;
            }
        }
    }
}

/* The sums of a convolution at all positions; `in` is elements in the order (y, x, channel). With a stride the positions
 * of a line alone have one distance. */
void tile_conv_sums(const ConvShape *conv, const uint16_t *in, const int32_t *weight, float *sums) {
    const int64_t row = conv->in_width * conv->in_channels, lines = conv->stride == 1 ? 1 : conv->out_height;
    const int64_t height = conv->out_height / lines;
    for (int64_t y = 0; y < lines; y++)
        tile_convolve(in + y * conv->stride * row, conv->stride * conv->in_channels, conv->in_width, height,
                      conv->out_width, conv->kernel, row, conv->kernel * conv->in_channels, weight,
                      conv->out_channels, sums + y * conv->out_width * conv->out_channels);
}

/* How the sum over a layer's output positions, by which its weight's gradient is made, is cut into steps of 16: each
 * line of positions into whole steps, or, with stride 1, the plane at once, its lines as far apart as the input's.
 * Between the positions lie columns where the transposed gradient is zero and the input is whatever comes next; behind
 * the saved input there is memory for a step, zero. */
typedef struct {
    int64_t lines, width, pitch; /* `width` columns in each line, a position every column, `pitch` in a line of outputs */
} GradientColumns;

static GradientColumns gradient_columns(const NetworkShape *shape, int64_t l) {
    const ConvShape *conv = &shape->convolution[l];
    const int64_t width = shape->transposed_columns[l];
    return conv->stride == 1 ? (GradientColumns){1, width, conv->in_width}
                             : (GradientColumns){conv->out_height, width, width};
}

/* The gradients of observations n and n + 1 by every convolution's sums, transposed:
 * for u, y, x: transposed_gradient[u][y * pitch + x] = conv_gradient[y][x][u], zero between */
void transpose_conv_gradient(const NetworkShape *shape, const BackwardArgs *back, int64_t n) {
    for (int64_t l = 0; l < shape->convolutions; l++) {
        const ConvShape *conv = &shape->convolution[l];
        const GradientColumns columns = gradient_columns(shape, l);
        const int64_t all = columns.lines * columns.width, units = conv->out_channels;
        const int32_t *gradient = back->conv_gradient[l] + n / 2 * conv->out_height * conv->out_width * units;
        int32_t *transposed = back->transposed_gradient[l] + n / 2 * units * all;
        for (int64_t p = 0; p < all; p += 16) {
            const int32_t *positions[16], *rows[16];
            for (int i = 0; i < 16; i++) {
                const int64_t y = (p + i) / columns.pitch, x = (p + i) % columns.pitch;
                const int there = y < conv->out_height && x < conv->out_width;
                positions[i] = there ? gradient + (y * conv->out_width + x) * units : NULL;
            }
            for (int64_t u = 0; u < units; u += 16) {
                Floats block[16][VECTORS];
                for (int i = 0; i < 16; i++) rows[i] = positions[i] ? positions[i] + u : NULL;
                load_transposed(rows, block);
                for (int j = 0; j < 16; j++) store_floats(transposed + (u + j) * all + p, block[j][0]);
            }
        }
    }
}

/* Add to a block of sums, (16 * a_tiles units, 16 * b_tiles channels), the steps [from, to) of one group. */
ALWAYS_INLINE void weight_sums(const int a_tiles, const int b_tiles, const int fresh, const ConvShape *conv,
                               const GradientColumns *columns, const int32_t *gradient, const int32_t *input,
                               int64_t from, int64_t to, float *sums) {
    const int64_t channels = conv->in_channels, stride = conv->stride * channels, per_line = columns->width / 16;
    const int64_t all = columns->lines * columns->width;
    if (fresh)
        zero_sums(a_tiles, b_tiles);
    else
        load_sums(a_tiles, b_tiles, sums, channels * 4);
    while (from < to) {
        const int64_t line = from / per_line, x = from % per_line;
        const int64_t count = per_line - x < to - from ? per_line - x : to - from;
        const int32_t *at = input + line * conv->stride * conv->in_width * channels + x * 16 * stride;
        add_products(a_tiles, b_tiles, gradient + from * 16, all * 4, 64, at, stride * 4, 16 * stride * 4, count);
        from += count;
    }
    store_sums(a_tiles, b_tiles, sums, channels * 4);
}

/* The weights' gradient in row `line` of layer l's kernel, and the bias's too with row 0, as conv_weight_backward. Sums
 * (column j, unit, channel) lie in the workspace. Some steps of a group, whose inputs and gradients fit the nearest
 * cache, are taken for all of them before the next. */
void tile_conv_weight_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t l,
                               int64_t line, uint8_t *workspace) {
    const ConvShape *conv = &shape->convolution[l];
    const GradientColumns columns = gradient_columns(shape, l);
    const int64_t units = conv->out_channels, channels = conv->in_channels, groups = (args->batch + 1) / 2;
    const int64_t all = columns.lines * columns.width, area = conv->in_height * conv->in_width * channels;
    const int64_t fit = L1_BYTES / 4 * 3 / (64 * (conv->stride * channels + units)), near = fit > 1 ? fit : 1;
    float *sums = (float *)workspace;
    for (int64_t group = 0; group < groups; group++) {
        const int32_t *gradient = back->transposed_gradient[l] + group * units * all;
        const int32_t *input = args->saved_input[l] + group * area + line * conv->in_width * channels;
        for (int64_t from = 0; from < all / 16; from += near) {
            const int64_t to = from + near < all / 16 ? from + near : all / 16;
            for (int64_t j = 0; j < conv->kernel; j++) {
                for (int64_t u = 0; u < units; u += 32) {
                    for (int64_t c = 0; c < channels; c += 32) {
                        float *block = sums + (j * units + u) * channels + c;
                        const int a_tiles = tiles_of(units - u), b_tiles = tiles_of(channels - c);
                        DISPATCH_TILES(a_tiles, b_tiles, weight_sums, group + from == 0, conv, &columns,
                                       gradient + u * all, input + j * channels + c, from, to, block);
                    }
                }
            }
        }
    }
    for (int64_t j = 0; j < conv->kernel; j++) { /* from (unit, channel) to (channel, unit) */
        float *out = back->weight_gradient[l] + (line * conv->kernel + j) * channels * units;
        for (int64_t u = 0; u < units; u += 16) {
            for (int64_t c = 0; c < channels; c += 16) {
                const int32_t *rows[16];
                Floats block[16][VECTORS];
                for (int i = 0; i < 16; i++) rows[i] = (const int32_t *)sums + (j * units + u + i) * channels + c;
                load_transposed(rows, block);
                for (int i = 0; i < 16; i++) store_floats(out + (c + i) * units + u, block[i][0]);
            }
        }
    }
    if (line || args->normalization[l]) return;
    const int64_t count = groups * conv->out_height * conv->out_width;
    for (int64_t u = 0; u < units; u += 16) {
        Floats sum = zeros();
        for (int64_t i = 0; i < count; i++)
            sum = multiply_add(BFLOAT16, sum, ones(BFLOAT16), load_words(back->conv_gradient[l] + i * units + u));
        store_floats(back->bias_gradient[l] + u, sum);
    }
}
#endif
