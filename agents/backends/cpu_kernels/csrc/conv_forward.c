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
#include "output_normalization.h"
#include "tiles.h"
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
        const uint64_t wanted = USES_TILES(shape, TILE_CONV_WEIGHT) ? first_bits(conv->in_width) : saved[y];
        save_nonzero_blocks(precision, wanted, conv->in_channels, line, pair ? second : NULL, words);
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

/* The inputs, outputs and sums of two observations in a thread's workspace. Inputs and outputs are exchanged from layer to
 * layer. */
typedef struct {
    void *in[2], *out[2];
    float *sums[2];
    PositionList list;
    uint64_t nonzero[2][MAX_BLOCKS]; /* masks of the input's rows */
} PairBuffers;

ALWAYS_INLINE void place_buffers(const Precision precision, const NetworkShape *shape, uint8_t *workspace,
                                 PairBuffers *buffers) {
    const int64_t size = shape->max_activation;
    for (int i = 0; i < 2; i++) {
        buffers->in[i] = element_at(precision, workspace, i * size);
        buffers->out[i] = element_at(precision, workspace, (2 + i) * size);
        buffers->sums[i] = (float *)element_at(precision, workspace, 4 * size) + i * size;
    }
    buffers->list.input = (const int32_t **)(buffers->sums[1] + size);
    buffers->list.sums = (float **)(buffers->list.input + shape->max_positions);
}

/* The sums of layer l at all positions of both observations; the masks become those of its output. */
ALWAYS_INLINE void conv_sums(const Precision precision, const NetworkShape *shape, const ForwardArgs *args, int64_t l,
                             PairBuffers *buffers, float *const *sums, FramePrefetch *ahead) {
    const ConvShape *conv = &shape->convolution[l];
    const int64_t channel_words = conv->in_channels / pair_size(precision), channels = conv->out_channels;
    const int64_t row_stride = conv->in_width * channel_words, row_words = conv->kernel * channel_words;
    const int32_t *weight = args->conv_weight[l];
    if (precision == BFLOAT16 && USES_TILES(shape, TILE_CONV_FORWARD)) { /* of a network with normalizations */
        for (int i = 0; i < 2; i++) {
            propagate_nonzero(conv, buffers->nonzero[i]);
            tile_conv_sums(conv, buffers->in[i], weight, sums[i]);
        }
        return;
    }
    PositionList *list = &buffers->list;
    list->count = 0;
    for (int i = 0; i < 2; i++) {
        propagate_nonzero(conv, buffers->nonzero[i]);
        list_nonzero_positions(conv, buffers->in[i], channel_words, buffers->nonzero[i], sums[i], list);
    }
    for (int64_t p = list->count; p < MAX_TILE; p++) {
        list->input[p] = list->input[0];
        list->sums[p] = list->sums[0];
    }
    FramePrefetch *prefetch = l ? NULL : ahead;
    ahead->share = 2 * shape->frames * ahead->bytes / 64 / (list->count / 12 + 1) + 1;
    int64_t u = 0;
#if VECTOR_LANES == 16
    for (; u + 64 <= channels; u += 64)
        conv_positions_64(precision, list, conv->kernel, row_stride, row_words, weight, channels, u, prefetch);
    for (; u + 32 <= channels; u += 32)
        conv_positions_32(precision, list, conv->kernel, row_stride, row_words, weight, channels, u, prefetch);
#endif
    for (; u < channels; u += 16)
        conv_positions_16(precision, list, conv->kernel, row_stride, row_words, weight, channels, u, prefetch);
    for (int i = 0; i < 2; i++) copy_zero_positions(conv, buffers->nonzero[i], sums[i]);
}

/* From layer l's sums for observations n and `second` to the next layer's input, in `out`, or to the hidden layer's. */
ALWAYS_INLINE void conv_output(const Precision precision, const NetworkShape *shape, const ForwardArgs *args, int64_t l,
                               int64_t n, int64_t second, const PairBuffers *buffers, void *const *out) {
    const ConvShape *conv = &shape->convolution[l];
    const Normalization *norm = args->normalization[l];
    const int64_t size = conv->out_height * conv->out_width * conv->out_channels, pair = second > n;
    for (int i = 0; norm && i < 2; i++) {
        const int64_t of = i ? second : n;
        normalize(norm, of, needs_batch(norm) ? norm->sums + of * size : buffers->sums[i], buffers->sums[i]);
    }
    const int last = l == shape->convolutions - 1;
    int32_t *saved = args->saved_input[l + 1];
    if (saved) saved += n / pair_size(precision) * size;
    bias_relu(precision, conv, args->conv_bias[l], last, pair, buffers->sums[0], buffers->sums[1],
              last ? element_at(precision, args->flat, n * size) : out[0],
              last ? element_at(precision, args->flat, second * size) : out[1], saved,
              saved && pair ? saved + size : NULL);
}

/* Keep layer l's sums and masks until those of all observations are there. */
ALWAYS_INLINE void keep_for_batch(const Normalization *norm, int64_t n, int64_t second, const PairBuffers *buffers) {
    for (int i = 0; i < 2; i++) {
        const int64_t of = i ? second : n;
        memcpy(norm->nonzero + of * MAX_BLOCKS, buffers->nonzero[i], sizeof buffers->nonzero[i]);
        if (!i || second > n) observation_statistics(norm, of);
    }
}

/* The convolutions from layer `from` on for observations n and n + 1 (n twice where there is no other): all of them, or
 * up to the sums of the first that needs the statistics of the minibatch, behind which `from` is to go on. `next` is the
 * observation that this thread probably takes afterwards: its frames lie anywhere in memory, so they are prefetched. */
ALWAYS_INLINE void conv_forward_template(const Precision precision, const NetworkShape *shape, const ForwardArgs *args,
                                         int64_t from, int64_t n, int64_t next, uint8_t *workspace) {
    const int64_t second = n + 1 < args->batch ? n + 1 : n, group = n / pair_size(precision);
    const int64_t frame_bytes =
        shape->convolution[0].in_width * shape->block * shape->convolution[0].in_height * shape->block;
    PairBuffers buffers;
    place_buffers(precision, shape, workspace, &buffers);
    FramePrefetch ahead = {.count = 0, .bytes = frame_bytes, .next = 0};
    if (from) {
        for (int i = 0; i < 2; i++)
            memcpy(buffers.nonzero[i], args->normalization[from - 1]->nonzero + (i ? second : n) * MAX_BLOCKS,
                   sizeof buffers.nonzero[i]);
        conv_output(precision, shape, args, from - 1, n, second, &buffers, buffers.in);
    } else {
        for (int i = 0; i < 2; i++) {
            const uint8_t *frames[MAX_FRAMES];
            find_frames(shape, args, i ? second : n, frame_bytes, frames);
            pack_observation(precision, shape, frames, buffers.in[i], buffers.nonzero[i]);
        }
        if (args->saved_input[0])
            save_observations(precision, shape, args, group, second > n, buffers.in[0], buffers.in[1],
                              buffers.nonzero);
        for (int64_t i = next; i < next + 2 && i < args->batch; i++, ahead.count += shape->frames)
            find_frames(shape, args, i, frame_bytes, ahead.frames + ahead.count);
    }
    for (int64_t l = from; l < shape->convolutions; l++) {
        const Normalization *norm = args->normalization[l];
        if (needs_batch(norm)) {
            const int64_t size = norm->positions * norm->units;
            float *const sums[2] = {norm->sums + n * size, norm->sums + second * size};
            conv_sums(precision, shape, args, l, &buffers, sums, &ahead);
            keep_for_batch(norm, n, second, &buffers);
            return;
        }
        conv_sums(precision, shape, args, l, &buffers, buffers.sums, &ahead);
        conv_output(precision, shape, args, l, n, second, &buffers, buffers.out);
        for (int i = 0; i < 2; i++) {
            void *swapped = buffers.in[i];
            buffers.in[i] = buffers.out[i];
            buffers.out[i] = swapped;
        }
    }
}

void conv_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t from, int64_t n, int64_t next,
                  uint8_t *workspace) {
    DISPATCH(shape->precision, conv_forward_template, shape, args, from, n, next, workspace);
}

#ifdef __AVX512BF16__
/* For tile_forward.c: observation n as elements (in_height, in_width, in_channels), and its masks. */
void pack_bfloat16_observation(const NetworkShape *shape, const uint8_t *const *frames, void *packed,
                               uint64_t *nonzero) {
    pack_observation(BFLOAT16, shape, frames, packed, nonzero);
}
#endif
#endif
