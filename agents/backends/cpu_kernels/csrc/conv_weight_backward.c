/* The gradients by the convolutions' weights and biases, and the convolutions' step. */
#include "kernels.h"
#include "nonzero_blocks.h"
#include "outer_product.h"
#ifdef VECTOR_KERNELS

/* The weights' gradient in row `line` of layer l's kernel, and the bias's too with row 0; dy = conv_gradient:
 * for j, c, u: weight_gradient[line][j][c][u] =
 *     sum over n, y, x: input[n][y * stride + line][x * stride + j][c] * dy[n][y][x][u]
 * for u: bias_gradient[u] = sum over n, y, x: dy[n][y][x][u]
 * A few rows of output positions, whose inputs fit the nearest cache, are visited for all columns j before the next:
 * from further away they would not come as fast as they are used. */
ALWAYS_INLINE void conv_weight_backward_template(const Precision precision, const NetworkShape *shape,
                                                 const ForwardArgs *args, const BackwardArgs *back, int64_t l,
                                                 int64_t line) {
    const ConvShape *conv = &shape->convolution[l];
    const int64_t groups = (args->batch + pair_size(precision) - 1) / pair_size(precision);
    const int64_t units = conv->out_channels, channels = conv->in_channels, width = conv->out_width;
    const int64_t positions = conv->out_height * width, area = conv->in_height * conv->in_width * channels;
    const int64_t y_stride = conv->stride * conv->in_width * channels, x_stride = conv->stride * channels;
    const int64_t fit = L1_BYTES / 4 * 3 / 4 / (y_stride + width * units), near = fit > 1 ? fit : 1;
    /* The next rows are prefetched in as many shares as there are tiles. */
#if VECTOR_LANES == 16
    const int64_t rest = units % 64, blocks = units / 64 * 2 + rest / 32 + rest % 32 / 16;
#else
    const int64_t blocks = units / 16;
#endif
    const int64_t tiles = conv->kernel * blocks * channels / OUTER_ROWS;
    const int64_t x_share = near * y_stride / tiles + 16, g_share = near * width * units / tiles + 16;
    int32_t offsets[near * width][2];
    for (int64_t from = 0; from < groups * conv->out_height;) { /* a row of positions of all observations */
        const int64_t y = from % conv->out_height, count = y + near < conv->out_height ? near : conv->out_height - y;
        const int32_t *g = back->conv_gradient[l] + from * width * units;
        const int32_t *at =
            args->saved_input[l] + from / conv->out_height * area + y * y_stride + line * conv->in_width * channels;
        const int32_t *x_next = at + count * y_stride, *g_next = g + count * width * units;
        const uint64_t *nonzero =
            l ? NULL : args->nonzero_blocks + from / conv->out_height * conv->in_height + y + line;
        const int fresh = from == 0;
        for (int64_t tap = 0; tap < conv->kernel; tap++, at += channels) {
            int64_t there;
            float *sums = back->weight_gradient[l] + (line * conv->kernel + tap) * channels * units;
            if (nonzero && (there = list_nonzero_taps(conv, nonzero, count, tap, offsets)) >= 0) {
                const int32_t(*list)[2] = (const int32_t(*)[2])offsets;
                int64_t u = 0;
#if VECTOR_LANES == 16
                for (; u + 32 <= units; u += 32) {
                    for (int64_t c = 0; c < channels; c += 8) {
                        prefetch_words(&x_next, x_share), prefetch_words(&g_next, g_share);
                        outer_product_tile(precision, 8, 2, sums + c * units + u, units, fresh, at + c, 1, 0, there, 0,
                                           g + u, 0, list);
                    }
                }
#endif
                for (; u < units; u += 16) {
                    for (int64_t c = 0; c < channels; c += OUTER_ROWS) {
                        prefetch_words(&x_next, x_share), prefetch_words(&g_next, g_share);
                        outer_product_tile(precision, OUTER_ROWS, VECTORS, sums + c * units + u, units, fresh, at + c,
                                           1, 0, there, 0, g + u, 0, list);
                    }
                }
                continue;
            }
            int64_t u = 0;
#if VECTOR_LANES == 16
            for (; u + 64 <= units; u += 64) {
                for (int64_t c = 0; c < channels; c += 4) {
                    prefetch_words(&x_next, x_share), prefetch_words(&g_next, g_share);
                    outer_product_tile(precision, 4, 4, sums + c * units + u, units, fresh, at + c, count, y_stride,
                                       width, x_stride, g + u, units, NULL);
                }
            }
            for (; u + 32 <= units; u += 32) {
                for (int64_t c = 0; c < channels; c += 8) {
                    prefetch_words(&x_next, x_share), prefetch_words(&g_next, g_share);
                    outer_product_tile(precision, 8, 2, sums + c * units + u, units, fresh, at + c, count, y_stride,
                                       width, x_stride, g + u, units, NULL);
                }
            }
#endif
            for (; u < units; u += 16) {
                for (int64_t c = 0; c < channels; c += OUTER_ROWS) {
                    prefetch_words(&x_next, x_share), prefetch_words(&g_next, g_share);
                    outer_product_tile(precision, OUTER_ROWS, VECTORS, sums + c * units + u, units, fresh, at + c,
                                       count, y_stride, width, x_stride, g + u, units, NULL);
                }
            }
        }
        from += count;
    }
    if (line || args->normalization[l]) return; /* behind a normalization the bias's gradient is the sum of another */
    for (int64_t u = 0; u < units; u += VECTOR_LANES) {
        Floats sum = zeros();
        for (int64_t i = 0; i < groups * positions; i++) {
            const Words g = load_words(back->conv_gradient[l] + i * units + u);
            sum = multiply_add(precision, sum, ones(precision), g);
        }
        store_floats(back->bias_gradient[l] + u, sum);
    }
}

/* Compiled apart for each precision: in one function gcc finds worse registers for both. */
static NOINLINE void conv_weight_backward_float32(const NetworkShape *shape, const ForwardArgs *args,
                                                  const BackwardArgs *back, int64_t l, int64_t line) {
    conv_weight_backward_template(FLOAT32, shape, args, back, l, line);
}

#ifdef __AVX512BF16__
static NOINLINE void conv_weight_backward_bfloat16(const NetworkShape *shape, const ForwardArgs *args,
                                                   const BackwardArgs *back, int64_t l, int64_t line) {
    conv_weight_backward_template(BFLOAT16, shape, args, back, l, line);
}
#endif

void conv_weight_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t l,
                          int64_t line) {
#ifdef __AVX512BF16__
    if (shape->precision == BFLOAT16) {
        conv_weight_backward_bfloat16(shape, args, back, l, line);
        return;
    }
#endif
    conv_weight_backward_float32(shape, args, back, l, line);
}

/* gather_step_and_pack_unit for a convolution's units [first, first + 16). Gradient and packed weight have units
 * next to each other, v has inputs: 16 x 16 numbers are transposed at a time, so that everything is moved in whole
 * vectors. */
ALWAYS_INLINE void conv_step_template(const Precision precision, const TrainedLayer *layer, int64_t first,
                                      uint8_t *workspace, const OptimizerStep *step) {
    const int64_t inputs = layer->inputs, units = layer->units, pair = pair_size(precision);
    float *rows = (float *)workspace, *columns = rows + 16 * inputs; /* (16, inputs) and (inputs, 16) */
    int32_t *input_of = (int32_t *)(columns + 16 * inputs);          /* in the order of gradient and packed weight */
    const float *gradient = (const float *)layer->packed_gradient + first;
    Floats block[16][VECTORS];
    for (int64_t i = 0; i < inputs; i += 16) {
        UNROLL for (int k = 0; k < 16; k++) {
            const float *row = gradient + layer->gradient_offset[i + k];
            UNROLL for (int v = 0; v < VECTORS; v++) block[k][v] = load_floats(row + VECTOR_LANES * v);
        }
        transpose_16x16(block);
        UNROLL for (int u = 0; u < 16; u++) store_16(rows + u * inputs + i, block[u]);
    }
    float scales[16];
    for (int64_t u = 0; u < 16; u++) {
        step_unit(layer, first + u, rows + u * inputs, step);
        scales[u] = packed_scale(layer, first + u);
    }
    for (int64_t i = 0; i < inputs; i += 16) {
        UNROLL for (int u = 0; u < 16; u++) {
            const float *row = layer->v + (first + u) * inputs + i;
            const Floats scale = broadcast_float(scales[u]);
            UNROLL for (int v = 0; v < VECTORS; v++) block[u][v] = load_floats(row + VECTOR_LANES * v) * scale;
        }
        transpose_16x16(block);
        for (int k = 0; k < 16; k++) {
            const int64_t at = layer->gradient_offset[i + k] / units;
            input_of[at] = (int32_t)(i + k);
            store_16(columns + 16 * at, block[k]);
        }
    }
    for (int64_t at = 0; at < inputs; at += pair) {
        int32_t *packed = (int32_t *)layer->packed + at / pair * units + first;
#ifdef __AVX512BF16__
        if (precision == BFLOAT16) {
            const __m512i low[2] = {to_bfloat16_words(load_floats(columns + 16 * at)),
                                    to_bfloat16_words(load_floats(columns + 16 * at + 16))};
            _mm512_storeu_si512(packed, pair_words(low[0], low[1]));
            for (int i = 0; layer->transposed && i < 2; i++) {
                uint16_t *out = (uint16_t *)layer->transposed + layer->transposed_offset[input_of[at + i]];
                int32_t pairs[8];
                _mm256_storeu_si256((__m256i *)pairs, _mm512_cvtepi32_epi16(low[i]));
                for (int64_t u = 0; u < 8; u++)
                    memcpy(out + (first / 2 + u) * layer->transposed_unit_stride, pairs + u, 4);
            }
            continue;
        }
#endif
        memcpy(packed, columns + 16 * at, 64);
        if (!layer->transposed) continue;
        float *out = (float *)layer->transposed + layer->transposed_offset[input_of[at]];
        for (int64_t u = 0; u < 16; u++) out[(first + u) * layer->transposed_unit_stride] = columns[16 * at + u];
    }
}

void conv_step(const TrainedLayer *layer, int64_t precision, int64_t first, uint8_t *workspace, const OptimizerStep *step) {
    DISPATCH(precision, conv_step_template, layer, first, workspace, step);
}
#endif
