/* The forward pass of the convolutions: frames to the features that the hidden layer takes.
 *
 * Of each layer, with ReLU and in channels-last order (y, x, channel):
 * for y, x, u: out[y][x][u] =
 *     max(0, bias[u] + sum over i, j, c: in[y * stride + i][x * stride + j][c] * weight[i][j][c][u])
 * A sum starts from zero and adds i, then j, then c (two at a time in bfloat16); vectors lie along u.
 */
#include "conv_tile.h"
#include "kernels.h"
#include "nonzero_blocks.h"
#ifdef VECTOR_KERNELS
#include "frames.h"

#if VECTOR_LANES == 16
/* pack_block_row for blocks of 4 x 4 pixels and frames by fours: a block's line of pixels is a word, and 16 lines of 16
 * blocks are transposed. Returns the mask of nonzero blocks. */
ALWAYS_INLINE uint64_t pack_block_row_4x4(const Precision precision, const uint8_t *const *frames, int64_t start,
                                          int64_t count, int64_t width, void *packed) {
    uint64_t nonzero = 0;
    const int64_t blocks = width / 4, channels = count * 16;
    for (int64_t f = 0; f < count; f += 4) {
        for (int64_t x = 0; x < blocks; x += 16) {
            const int64_t left = blocks - x < 16 ? blocks - x : 16;
            Floats block[16][1];
            UNROLL for (int i = 0; i < 16; i++) {
                const uint8_t *line = frames[f + i / 4] + start + i % 4 * width + 4 * x;
                block[i][0] = _mm512_maskz_loadu_ps((__mmask16)((1 << left) - 1), line);
            }
            transpose_16x16(block);
            for (int64_t j = 0; j < left; j++) {
                void *out = element_at(precision, packed, (x + j) * channels + f * 16);
                uint8_t pixels[64];
                const __m512i words = (__m512i)block[j][0];
                nonzero |= (uint64_t)(_mm512_test_epi32_mask(words, words) != 0) << (x + j);
                store_floats(pixels, block[j][0]);
                for (int i = 0; i < 64; i += 16) {
                    const __m512i values = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(pixels + i)));
                    store_elements(precision, element_at(precision, out, i), _mm512_cvtepi32_ps(values));
                }
            }
        }
    }
    return nonzero;
}
#endif

/* Save the blocks of a row that `nonzero` has as words, of one observation or of a pair. */
ALWAYS_INLINE void save_nonzero_blocks(const Precision precision, uint64_t nonzero, int64_t channels, const void *in,
                                       const void *second, int32_t *words) {
    for (; nonzero; nonzero &= nonzero - 1) {
        const int64_t start = __builtin_ctzll(nonzero) * channels;
        for (int64_t i = start; i < start + channels; i += VECTOR_LANES) {
#ifdef __AVX512BF16__
            if (precision == BFLOAT16) {
                __m512i high = _mm512_setzero_si512();
                if (second) high = load_bfloat16_words((const uint16_t *)second + i);
                _mm512_storeu_si512(words + i, pair_words(load_bfloat16_words((const uint16_t *)in + i), high));
                continue;
            }
#endif
            (void)second;
            store_words(words + i, load_words((const int32_t *)in + i));
        }
    }
}

/* conv_tile at all positions of a list, for output channels from `first` on. */
ALWAYS_INLINE void conv_positions_template(const Precision precision, const int count, const int vectors,
                                           const PositionList *list, int64_t rows, int64_t row_stride,
                                           int64_t row_words, const int32_t *weight, int64_t channels, int64_t first,
                                           FramePrefetch *ahead) {
    for (int64_t from = 0; from < list->count; from += count) {
        /* The last tile visits positions of the one before it again, and finds the same sums. */
        const int64_t start = from + count <= list->count ? from : list->count > count ? list->count - count : 0;
        const int32_t *at[MAX_TILE];
        float *out[MAX_TILE];
        for (int p = 0; p < count; p++) {
            at[p] = list->input[start + p];
            out[p] = list->sums[start + p] + first;
        }
        if (ahead) prefetch_frames(ahead);
        conv_tile(precision, count, vectors, at, rows, row_stride, row_words, weight + first, channels, out);
    }
}

/* For 64, 32 and 16 output channels; only vectors of 512 bits have registers for more than 16. Functions of their own:
 * within a larger one gcc may run out of registers. */
#define POSITIONS                                                                                                    \
    const Precision precision, const PositionList *list, int64_t rows, int64_t row_stride, int64_t row_words,        \
        const int32_t *weight, int64_t channels, int64_t first, FramePrefetch *ahead
#if VECTOR_LANES == 16
static NOINLINE void conv_positions_64(POSITIONS) {
    DISPATCH(precision, conv_positions_template, 6, 4, list, rows, row_stride, row_words, weight, channels, first,
             ahead);
}
static NOINLINE void conv_positions_32(POSITIONS) {
    DISPATCH(precision, conv_positions_template, 10, 2, list, rows, row_stride, row_words, weight, channels, first,
             ahead);
}
#endif
static NOINLINE void conv_positions_16(POSITIONS) {
    DISPATCH(precision, conv_positions_template, TILE_POSITIONS, VECTORS, list, rows, row_stride, row_words, weight,
             channels, first, ahead);
}
#undef POSITIONS

/* Pack an observation, elements (in_height, in_width, in_channels); `nonzero` (in_height) gets the masks. */
ALWAYS_INLINE void pack_observation(const Precision precision, const NetworkShape *shape, const uint8_t *const *frames,
                                    void *packed, uint64_t *nonzero) {
    const ConvShape *conv = &shape->convolution[0];
    const int64_t block = shape->block, width = conv->in_width * block;
    for (int64_t y = 0; y < conv->in_height; y++) {
        void *row = element_at(precision, packed, y * conv->in_width * conv->in_channels);
#if VECTOR_LANES == 16
        if (block == 4 && shape->frames % 4 == 0) {
            nonzero[y] = pack_block_row_4x4(precision, frames, 4 * y * width, shape->frames, width, row);
            continue;
        }
#endif
        pack_block_row(frames, y * block * width, shape->frames, width, block, precision == BFLOAT16, row);
        nonzero[y] = find_nonzero_blocks(precision, row, conv->in_width, conv->in_channels);
    }
#ifdef VISIT_ZERO_BLOCKS
    for (int64_t y = 0; y < conv->in_height; y++) nonzero[y] = first_bits(conv->in_width);
#endif
}

/* Save the first layer's input for the backward pass. `pair`: whether there is a second observation. */
ALWAYS_INLINE void save_observations(const Precision precision, const NetworkShape *shape, const ForwardArgs *args,
                                     int64_t group, int64_t pair, const void *in, const void *in_second,
                                     uint64_t (*nonzero)[MAX_BLOCKS]) {
    const ConvShape *conv = &shape->convolution[0];
    const int64_t row = conv->in_width * conv->in_channels;
    int32_t *words = args->saved_input[0] + group * conv->in_height * row;
    uint64_t *saved = args->nonzero_blocks + group * conv->in_height;
    for (int64_t y = 0; y < conv->in_height; y++, words += row) {
        const void *line = element_at(precision, in, y * row), *second = element_at(precision, in_second, y * row);
        saved[y] = nonzero[0][y] | (precision == BFLOAT16 && pair ? nonzero[1][y] : 0);
        save_nonzero_blocks(precision, saved[y], conv->in_channels, line, pair ? second : NULL, words);
        if (precision == BFLOAT16 || !pair) continue;
        saved[conv->in_height + y] = nonzero[1][y];
        save_nonzero_blocks(precision, nonzero[1][y], conv->in_channels, second, NULL, words + conv->in_height * row);
    }
}

/* Add the bias to a layer's sums (positions, out_channels) of two observations, apply the ReLU and store the elements;
 * those of the last layer in the order (channel, position) of the hidden layer's input. `saved` and `saved_second` are
 * where the next layer's input is saved, or NULL. */
ALWAYS_INLINE void bias_relu(const Precision precision, const ConvShape *conv, const float *conv_bias, int last,
                             int64_t pair, float *sums, float *sums_second, void *out, void *out_second, int32_t *saved,
                             int32_t *saved_second) {
    const int64_t positions = conv->out_height * conv->out_width, channels = conv->out_channels;
    for (int64_t p = 0; p < positions; p++) {
        for (int64_t u = 0; u < channels; u += VECTOR_LANES) {
            const int64_t i = p * channels + u;
            const Floats bias = load_floats(conv_bias + u);
            const Floats a = relu(load_floats(sums + i) + bias), b = relu(load_floats(sums_second + i) + bias);
            if (!last) {
                store_elements(precision, element_at(precision, out, i), a);
                store_elements(precision, element_at(precision, out_second, i), b);
                if (saved)
                    store_observations(precision, saved + i, saved_second ? saved_second + i : NULL, a,
                                       pair ? b : zeros());
            } else {
                store_floats(sums + i, a);
                store_floats(sums_second + i, b);
            }
        }
    }
    if (!last) return;
    for (int64_t u = 0; u < channels; u++) {
        for (int64_t p = 0; p < positions; p++) {
            const int64_t i = u * positions + p;
            const float a = sums[p * channels + u], b = sums_second[p * channels + u];
            if (precision == BFLOAT16) {
                const uint16_t low = to_bfloat16(a), high = to_bfloat16(b);
                ((uint16_t *)out)[i] = low;
                ((uint16_t *)out_second)[i] = high;
                if (saved) saved[i] = (int32_t)((uint32_t)low | (uint32_t)(pair ? high : 0) << 16);
            } else {
                ((float *)out)[i] = a;
                ((float *)out_second)[i] = b;
                if (saved) memcpy(saved + i, &a, 4);
                if (saved && saved_second) memcpy(saved_second + i, &b, 4);
            }
        }
    }
}

/* All convolutions for observations n and n + 1 (n twice where there is no other). `next` is the observation that this
 * thread probably takes afterwards: its frames lie anywhere in memory, so they are prefetched. */
ALWAYS_INLINE void conv_forward_template(const Precision precision, const NetworkShape *shape, const ForwardArgs *args,
                                         int64_t n, int64_t next, uint8_t *workspace) {
    const int64_t second = n + 1 < args->batch ? n + 1 : n, pair = second > n, group = n / pair_size(precision);
    const int64_t frame_bytes =
        shape->convolution[0].in_width * shape->block * shape->convolution[0].in_height * shape->block;
    /* Inputs and outputs alternate between two pairs of buffers. */
    void *in = workspace, *in_second = element_at(precision, in, shape->max_activation);
    void *out = element_at(precision, in_second, shape->max_activation);
    void *out_second = element_at(precision, out, shape->max_activation);
    float *sums = element_at(precision, out_second, shape->max_activation);
    float *sums_second = sums + shape->max_activation;
    PositionList list = {.input = (const int32_t **)(sums_second + shape->max_activation)};
    list.sums = (float **)(list.input + shape->max_positions);
    uint64_t nonzero[2][MAX_BLOCKS];
    for (int i = 0; i < 2; i++) {
        const uint8_t *frames[MAX_FRAMES];
        find_frames(shape, args, i ? second : n, frame_bytes, frames);
        pack_observation(precision, shape, frames, i ? in_second : in, nonzero[i]);
    }
    if (args->saved_input[0]) save_observations(precision, shape, args, group, pair, in, in_second, nonzero);
    FramePrefetch ahead = {.count = 0, .bytes = frame_bytes, .next = 0};
    for (int64_t i = next; i < next + 2 && i < args->batch; i++, ahead.count += shape->frames)
        find_frames(shape, args, i, frame_bytes, ahead.frames + ahead.count);
    for (int64_t l = 0; l < shape->convolutions; l++) {
        const ConvShape *conv = &shape->convolution[l];
        const int64_t channel_words = conv->in_channels / pair_size(precision), channels = conv->out_channels;
        const int64_t row_stride = conv->in_width * channel_words, row_words = conv->kernel * channel_words;
        const int32_t *weight = args->conv_weight[l];
        list.count = 0;
        for (int i = 0; i < 2; i++) {
            propagate_nonzero(conv, nonzero[i]);
            list_nonzero_positions(conv, i ? in_second : in, channel_words, nonzero[i], i ? sums_second : sums, &list);
        }
        for (int64_t p = list.count; p < MAX_TILE; p++) {
            list.input[p] = list.input[0];
            list.sums[p] = list.sums[0];
        }
        FramePrefetch *prefetch = l ? NULL : &ahead;
        ahead.share = 2 * shape->frames * frame_bytes / 64 / (list.count / 12 + 1) + 1;
        int64_t u = 0;
#if VECTOR_LANES == 16
        for (; u + 64 <= channels; u += 64)
            conv_positions_64(precision, &list, conv->kernel, row_stride, row_words, weight, channels, u, prefetch);
        for (; u + 32 <= channels; u += 32)
            conv_positions_32(precision, &list, conv->kernel, row_stride, row_words, weight, channels, u, prefetch);
#endif
        for (; u < channels; u += 16)
            conv_positions_16(precision, &list, conv->kernel, row_stride, row_words, weight, channels, u, prefetch);
        copy_zero_positions(conv, nonzero[0], sums);
        copy_zero_positions(conv, nonzero[1], sums_second);
        const int last = l == shape->convolutions - 1;
        const int64_t size = conv->out_height * conv->out_width * channels;
        int32_t *saved = args->saved_input[l + 1] ? args->saved_input[l + 1] + group * size : NULL;
        int32_t *saved_second = saved && pair ? saved + size : NULL;
        bias_relu(precision, conv, args->conv_bias[l], last, pair, sums, sums_second,
                  last ? element_at(precision, args->flat, n * size) : out,
                  last ? element_at(precision, args->flat, second * size) : out_second, saved, saved_second);
        void *swapped = in;
        in = out;
        out = swapped;
        swapped = in_second;
        in_second = out_second;
        out_second = swapped;
    }
}

void conv_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t n, int64_t next, uint8_t *workspace) {
    DISPATCH(shape->precision, conv_forward_template, shape, args, n, next, workspace);
}

#ifdef __AVX512BF16__
/* For tile_forward.c: observation n as elements (in_height, in_width, in_channels), and its masks. */
void pack_bfloat16_observation(const NetworkShape *shape, const uint8_t *const *frames, void *packed,
                               uint64_t *nonzero) {
    pack_observation(BFLOAT16, shape, frames, packed, nonzero);
}
#endif
#endif
