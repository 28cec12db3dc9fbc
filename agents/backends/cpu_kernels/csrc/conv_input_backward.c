/* The gradients by the sums of every convolution, from the hidden layer's input down.
 *
 * The gradient by a layer's input is again a convolution. With stride s and kernel k there are s * s of them, one
 * for each place (y, x) within a stride, of stride 1, with t = k / s taps on a side and zeros around the output's
 * gradient `dy`:
 * for h, w, c: dx[h * s + y][w * s + x][c] = sum over i, j, u: dy[h - i][w - j][u] * weight[i * s + y][j * s + x][c][u]
 * A sum adds i from t - 1 down, then j from t - 1 down, then u (two at a time in bfloat16); vectors lie along c.
 */
#include "conv_tile.h"
#include "kernels.h"
#include "output_normalization.h"
#include "tiles.h"
#ifdef VECTOR_KERNELS

/* A convolution of stride 1 over an array of words with a zero border: at position (y, x), `rows` rows of
 * `row_words` words from y * y_stride + x * x_stride on, rows row_stride apart. */
typedef struct {
    int64_t height, width, y_stride, x_stride, rows, row_stride, row_words;
    int64_t border, inner; /* rows of zeros above and below, and rows between them; border 0: there are none */
} Window;

/* Tiles of `count` positions of each of two observations from position `from` on; returns the first that is left over.
 * Rows of the border, which add nothing, are skipped; positions up to `to` have the same ones. */
ALWAYS_INLINE int64_t window_tiles(const Precision precision, const int count, const int vectors, int64_t from,
                                   int64_t to, const Window *window, const int32_t *first, const int32_t *second,
                                   const int32_t *weight, int64_t channels, float *out, float *out_second) {
    int64_t skipped = 0, rows = window->rows;
    if (window->border) {
        const int64_t y = from / window->width, end = window->border + window->inner - y;
        skipped = window->border > y ? window->border - y : 0;
        rows = (end < rows ? end : rows) - skipped;
    }
    first += skipped * window->row_stride;
    second += skipped * window->row_stride;
    weight += skipped * window->row_words * channels;
    for (; from + count <= to; from += count) {
        const int32_t *at[MAX_TILE];
        float *sums[MAX_TILE];
        for (int p = 0; p < count; p++) {
            const int64_t y = (from + p) / window->width, x = (from + p) % window->width;
            const int64_t offset = y * window->y_stride + x * window->x_stride;
            at[2 * p] = first + offset;
            at[2 * p + 1] = second + offset;
            sums[2 * p] = out + (from + p) * channels;
            sums[2 * p + 1] = out_second + (from + p) * channels;
        }
        conv_tile(precision, 2 * count, vectors, at, rows, window->row_stride, window->row_words, weight, channels,
                  sums);
    }
    return from;
}

/* All positions from `from` to `to`: by `count` as far as it goes, the rest one by one. */
ALWAYS_INLINE void window_positions(const Precision precision, const int count, const int vectors, int64_t from,
                                    int64_t to, const Window *window, const int32_t *first, const int32_t *second,
                                    const int32_t *weight, int64_t channels, float *out, float *out_second) {
    const int64_t left =
        window_tiles(precision, count, vectors, from, to, window, first, second, weight, channels, out, out_second);
    window_tiles(precision, 1, vectors, left, to, window, first, second, weight, channels, out, out_second);
}

/* For 64, 32 and 16 channels, as in the forward pass; `count` positions of two observations. Functions of their own:
 * within a larger one gcc may run out of registers. */
#define POSITIONS                                                                                                 \
    const Precision precision, int64_t from, int64_t to, const Window *window, const int32_t *first,              \
        const int32_t *second, const int32_t *weight, int64_t channels, float *out, float *out_second
#if VECTOR_LANES == 16
static NOINLINE void window_positions_64(POSITIONS) {
    DISPATCH(precision, window_positions, 3, 4, from, to, window, first, second, weight, channels, out, out_second);
}
static NOINLINE void window_positions_32(POSITIONS) {
    DISPATCH(precision, window_positions, 5, 2, from, to, window, first, second, weight, channels, out, out_second);
}
#endif
static NOINLINE void window_positions_16(POSITIONS) {
    DISPATCH(precision, window_positions, TILE_POSITIONS / 2, VECTORS, from, to, window, first, second, weight,
             channels, out, out_second);
}
#undef POSITIONS

/* The window's sums for two observations at all positions: float32 (height * width, channels) each. */
ALWAYS_INLINE void convolve_window(const Precision precision, const Window *window, const int32_t *first,
                                   const int32_t *second, const int32_t *weight, int64_t channels, float *out,
                                   float *out_second) {
    const int64_t positions = window->height * window->width;
    const int64_t band = window->border ? window->width : positions; /* positions that skip the same rows */
    int64_t c = 0;
#if VECTOR_LANES == 16
    for (; c + 64 <= channels; c += 64)
        for (int64_t from = 0; from < positions; from += band)
            window_positions_64(precision, from, from + band, window, first, second, weight + c, channels, out + c,
                                out_second + c);
    for (; c + 32 <= channels; c += 32)
        for (int64_t from = 0; from < positions; from += band)
            window_positions_32(precision, from, from + band, window, first, second, weight + c, channels, out + c,
                                out_second + c);
#endif
    for (; c < channels; c += 16)
        for (int64_t from = 0; from < positions; from += band)
            window_positions_16(precision, from, from + band, window, first, second, weight + c, channels, out + c,
                                out_second + c);
}

/* The ReLU's backward pass from (channel, position) to channels-last order; `output` is the layer's output, elements:
 * for p, u: out[p][u] = output[u][p] != 0 ? gradient[u][p] : 0 */
ALWAYS_INLINE void relu_backward_channels_last(const Precision precision, int64_t positions, int64_t channels,
                                               const void *output, const float *gradient, float *out) {
    for (int64_t u = 0; u < channels; u += 16) {
        for (int64_t p = 0; p < positions; p += 16) {
            const int64_t count = positions - p < 16 ? positions - p : 16;
#if VECTOR_LANES == 16
            const __mmask16 there = (__mmask16)((1 << count) - 1);
            Floats block[16][1];
            UNROLL for (int i = 0; i < 16; i++) {
                const int64_t at = (u + i) * positions + p;
                const void *values = element_at(precision, output, at);
                __mmask16 active;
                if (precision == BFLOAT16)
                    active = _mm256_mask_test_epi16_mask(there, _mm256_maskz_loadu_epi16(there, values),
                                                         _mm256_set1_epi16(-1));
                else
                    active = _mm512_mask_cmp_ps_mask(there, _mm512_maskz_loadu_ps(there, values), _mm512_setzero_ps(),
                                                     _CMP_NEQ_UQ);
                block[i][0] = _mm512_maskz_loadu_ps(active, gradient + at);
            }
            transpose_16x16(block);
            for (int64_t i = 0; i < count; i++) store_floats(out + (p + i) * channels + u, block[i][0]);
#else
            const float *values = output;
            for (int64_t i = 0; i < 16; i++) {
                for (int64_t j = 0; j < count; j++) {
                    const int64_t at = (u + i) * positions + p + j;
                    out[(p + j) * channels + u + i] = values[at] != 0.0f ? gradient[at] : 0.0f;
                }
            }
#endif
        }
    }
}

/* The ReLU's backward pass at one place (y, x) within a stride: sums[h * s + y][w * s + x] = from[h][w] where the
 * layer's input, saved as words, is not zero, for both observations. */
ALWAYS_INLINE void relu_backward_strided(const Precision precision, const ConvShape *conv, const Window *window,
                                         int64_t y, int64_t x, const int32_t *input, const int32_t *input_second,
                                         const float *from, const float *from_second, float *sums,
                                         float *sums_second) {
    const int64_t s = conv->stride, channels = conv->in_channels;
    for (int64_t p = 0; p < window->height * window->width; p++) {
        const int64_t to = ((p / window->width * s + y) * conv->in_width + p % window->width * s + x) * channels;
        for (int64_t c = 0; c < channels; c += VECTOR_LANES) {
            Words words = load_words(input + to + c), words_second = load_words(input_second + to + c);
            if (precision == BFLOAT16) { /* both observations' elements lie in the same words */
                words &= 0xffff;
                words_second &= (int32_t)0xffff0000;
            }
            const int64_t at = p * channels + c;
            store_floats(sums + to + c, keep_where(words != 0, load_floats(from + at)));
            store_floats(sums_second + to + c, keep_where(words_second != 0, load_floats(from_second + at)));
        }
    }
}

/* From gradients by y, in `sums`, to gradients by t, there too, for observations n and n + 1 (without `pair` n alone).
 * Where they depend on the whole minibatch those by y are kept in `gradient`, and returned to when that is `complete`.
 * Returns whether the gradients by t are there. */
static int normalization_backward(const Normalization *norm, int64_t batch, int64_t n, int64_t pair, int complete,
                                  float *sums, float *sums_second) {
    const int64_t size = norm->positions * norm->units;
    for (int64_t i = 0; i < 1 + pair; i++) {
        float *values = i ? sums_second : sums, *kept = norm->gradient + (n + i) * size;
        if (needs_batch(norm) && complete) {
            sums_gradient(norm, batch, n + i, kept, values);
            continue;
        }
        observation_gradients(norm, n + i, values);
        if (needs_batch(norm))
            memcpy(kept, values, (size_t)size * sizeof(float));
        else
            sums_gradient(norm, batch, n + i, values, values);
    }
    return complete || !needs_batch(norm);
}

/* conv_gradient of layer `from` and those below for observations n and n + 1 (n twice where there is no other), from the
 * gradient by the layer's y; `from` = `convolutions`: of all, from flat_gradient. At the first layer below whose gradient
 * depends on those of the whole minibatch its gradient by y is left in `gradient`, from which `from` is to go on. */
ALWAYS_INLINE void conv_input_backward_template(const Precision precision, const NetworkShape *shape,
                                                const ForwardArgs *args, const BackwardArgs *back, int64_t from,
                                                int64_t n, uint8_t *workspace) {
    const int64_t pair = n + 1 < args->batch, group = n / pair_size(precision);
    void *in = workspace, *in_second = element_at(precision, in, shape->max_activation);
    float *sums = element_at(precision, in_second, shape->max_activation), *sums_second = sums + shape->max_activation;
    float *made = sums_second + shape->max_activation, *made_second = made + shape->max_activation;
    for (int64_t l = from < shape->convolutions ? from : shape->convolutions - 1; l >= 0; l--) {
        const ConvShape *conv = &shape->convolution[l];
        const int64_t positions = conv->out_height * conv->out_width, units = conv->out_channels;
        const int64_t size = positions * units, taps = conv->kernel / conv->stride, border = l ? taps - 1 : 0;
        const int64_t padded_width = conv->out_width + 2 * border;
        int32_t *words = back->conv_gradient[l] + group * size, *second = pair ? words + size : NULL;
        if (l == shape->convolutions - 1 && l < from) {
            for (int i = 0; i < 2; i++) {
                const int64_t at = (n + (i ? pair : 0)) * size;
                relu_backward_channels_last(precision, positions, units, element_at(precision, args->flat, at),
                                            back->flat_gradient + at, i ? sums_second : sums);
            }
        }
        if (args->normalization[l] &&
            !normalization_backward(args->normalization[l], args->batch, n, pair, l == from, sums, sums_second))
            return;
        if (border) {
            const int64_t padded = (conv->out_height + 2 * border) * padded_width * units;
            memset(in, 0, padded * element_bytes(precision));
            memset(in_second, 0, padded * element_bytes(precision));
        }
        for (int64_t p = 0; p < positions; p++) {
            const int64_t at = ((p / conv->out_width + border) * padded_width + p % conv->out_width + border) * units;
            for (int64_t u = 0; u < units; u += VECTOR_LANES) {
                const int64_t i = p * units + u;
                const Floats a = load_floats(sums + i), b = load_floats(sums_second + i);
                if (l) {
                    store_elements(precision, element_at(precision, in, at + u), a);
                    store_elements(precision, element_at(precision, in_second, at + u), b);
                }
                store_observations(precision, words + i, second ? second + i : NULL, a, pair ? b : zeros());
            }
        }
        if (!l) return;
        const int64_t s = conv->stride, unit_words = units / pair_size(precision), channels = conv->in_channels;
        const Window window = {.height = conv->in_height / s,
                               .width = conv->in_width / s,
                               .y_stride = padded_width * unit_words,
                               .x_stride = unit_words,
                               .rows = taps,
                               .row_stride = padded_width * unit_words,
                               .row_words = taps * unit_words,
                               .border = border,
                               .inner = conv->out_height};
        const int64_t area = conv->in_height * conv->in_width * channels;
        const int32_t *input = args->saved_input[l] + group * area;
        const int32_t *input_second = input + (precision == BFLOAT16 ? 0 : pair * area);
        for (int64_t y = 0; y < s; y++) {
            for (int64_t x = 0; x < s; x++) {
                const int32_t *weight = back->transposed_weight[l] + (y * s + x) * taps * taps * unit_words * channels;
                if (USES_TILES(shape, TILE_CONV_INPUT)) {
                    for (int i = 0; i < 2; i++)
                        tile_convolve(i ? in_second : in, units, padded_width, window.height, window.width, taps,
                                      padded_width * units, taps * units, weight, channels, i ? made_second : made);
                } else {
                    convolve_window(precision, &window, in, in_second, weight, channels, made, made_second);
                }
                relu_backward_strided(precision, conv, &window, y, x, input, input_second, made, made_second, sums,
                                      sums_second);
            }
        }
    }
}

void conv_input_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t from,
                         int64_t n, uint8_t *workspace) {
    DISPATCH(shape->precision, conv_input_backward_template, shape, args, back, from, n, workspace);
}
#endif
