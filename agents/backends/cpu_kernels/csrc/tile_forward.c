/* The forward pass on the tile unit: what conv_forward.c and dense_forward.c compute on vectors. */
#include "tiles.h"
#ifdef TILE_KERNELS
#include "frames.h"
#include "nonzero_blocks.h"
#include "output_normalization.h"

/* Where row y of an input lies, in positions. Rows that a stride apart meet come one after the other, so that all output
 * positions of a plane lie at one distance: output (y, x) at y * line + x strides, line = in_width / stride. Those with
 * x >= out_width fall off the border; they are computed and not used. */
ALWAYS_INLINE int64_t plane_row(const ConvShape *conv, int64_t y) {
    return (y % conv->stride * (conv->in_height / conv->stride) + y / conv->stride) * conv->in_width;
}

/* Sums of output positions [first, first + 16 * a_tiles) and of channels [u, u + 16 * b_tiles), row-major with 32 in a
 * row; `in` is elements in the order of plane_row:
 * for p, u: sums[p][u] = sum over i, j, c: in[plane_row(i) + p * stride + j][c] * weight[i][j][c][u] */
ALWAYS_INLINE void plane_sums(const int a_tiles, const int b_tiles, const ConvShape *conv, const uint16_t *in,
                              const int32_t *weight, int64_t first, int64_t u, float *sums) {
    const int64_t channels = conv->in_channels, units = conv->out_channels, steps = conv->kernel * channels / 32;
    const int64_t stride = conv->stride * channels * 2;
    zero_sums(a_tiles, b_tiles);
    for (int64_t i = 0; i < conv->kernel; i++) {
        const uint16_t *row = in + (plane_row(conv, i) + first * conv->stride) * channels;
        add_products(a_tiles, b_tiles, row, stride, 64, weight + i * steps * 16 * units + u, units * 4, units * 64,
                     steps);
    }
    store_sums(a_tiles, b_tiles, sums, 128);
}

/* Where a layer's output goes. */
typedef struct {
    uint16_t *out[2];      /* of two observations, the next layer's input in its plane_row order; NULL after the last */
    const ConvShape *next;
    int32_t *words;        /* both as words (positions, channels), or NULL */
} LayerOutput;

/* Bias and ReLU of plane_sums' block for two observations; without `pair` the second is zero. */
ALWAYS_INLINE void store_block(const ConvShape *conv, const float *bias, int64_t pair, float (*sums)[32 * 32],
                               int64_t first, int64_t count, int64_t u, int64_t vectors, const LayerOutput *output) {
    const int64_t line = conv->in_width / conv->stride, units = conv->out_channels;
    int64_t y = first / line, x = first % line, row = output->next ? plane_row(output->next, y) : 0;
    for (int64_t p = 0; p < count; p++) {
        if (x < conv->out_width) {
            const int64_t at = (y * conv->out_width + x) * units + u, to = (row + x) * units + u;
            for (int64_t v = 0; v < vectors; v++) {
                const Floats b = load_floats(bias + u + 16 * v);
                const Floats low = relu(load_floats(sums[0] + 32 * p + 16 * v) + b);
                const Floats high = pair ? relu(load_floats(sums[1] + 32 * p + 16 * v) + b) : zeros();
                if (output->next) {
                    store_elements(BFLOAT16, output->out[0] + to + 16 * v, low);
                    store_elements(BFLOAT16, output->out[1] + to + 16 * v, high);
                }
                if (output->words) store_observations(BFLOAT16, output->words + at + 16 * v, NULL, low, high);
            }
        }
        if (++x < line) continue;
        x = 0, y++;
        if (output->next) row = plane_row(output->next, y);
    }
}

/* The last layer's output, words (positions, channels) that pair two observations, in the order (channel, position) of
 * the hidden layer's input: to each observation's elements, unless NULL, and to `saved` as words, unless NULL. */
static void store_flat(const ConvShape *conv, const int32_t *words, uint16_t *flat, uint16_t *flat_second,
                       int32_t *saved) {
    const int64_t positions = conv->out_height * conv->out_width, units = conv->out_channels;
    for (int64_t p = 0; p < positions; p += 16) {
        const int64_t count = positions - p < 16 ? positions - p : 16;
        const __mmask16 there = (__mmask16)((1 << count) - 1);
        for (int64_t u = 0; u < units; u += 16) {
            const int32_t *rows[16];
            Floats block[16][VECTORS];
            for (int i = 0; i < 16; i++) rows[i] = i < count ? words + (p + i) * units + u : NULL;
            load_transposed(rows, block);
            for (int j = 0; j < 16; j++) {
                const int64_t at = (u + j) * positions + p;
                const __m512i pairs = (__m512i)block[j][0];
                _mm512_mask_cvtepi32_storeu_epi16(flat + at, there, pairs);
                if (flat_second) _mm512_mask_cvtepi32_storeu_epi16(flat_second + at, there, _mm512_srli_epi32(pairs, 16));
                if (saved) _mm512_mask_storeu_epi32(saved + at, there, pairs);
            }
        }
    }
}

/* Pack both observations and, for the backward pass, save them with the masks of their nonzero blocks. */
static void pack_pair(const NetworkShape *shape, const ForwardArgs *args, int64_t n, int64_t second, uint16_t **in) {
    const ConvShape *conv = &shape->convolution[0];
    const int64_t frame_bytes = conv->in_width * shape->block * conv->in_height * shape->block;
    const int64_t pair = second > n, area = conv->in_height * conv->in_width * conv->in_channels;
    uint64_t nonzero[2][MAX_BLOCKS] = {{0}};
    for (int i = 0; i < 1 + pair; i++) {
        const uint8_t *frames[MAX_FRAMES];
        find_frames(shape, args, i ? second : n, frame_bytes, frames);
        pack_bfloat16_observation(shape, frames, in[i], nonzero[i]);
    }
    if (!args->saved_input[0]) return;
    int32_t *words = args->saved_input[0] + n / 2 * area;
    for (int64_t i = 0; i < area; i += 16) {
        const __m512i high = pair ? load_bfloat16_words(in[1] + i) : _mm512_setzero_si512();
        _mm512_storeu_si512(words + i, pair_words(load_bfloat16_words(in[0] + i), high));
    }
    for (int64_t y = 0; y < conv->in_height; y++)
        args->nonzero_blocks[n / 2 * conv->in_height + y] = nonzero[0][y] | nonzero[1][y];
}

/* conv_forward on tiles, of a network whose convolutions have no normalizations. All blocks are computed, those of zeros too: few tiles meet nothing else. */
void tile_conv_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t n, int64_t next, uint8_t *workspace) {
    const int64_t second = n + 1 < args->batch ? n + 1 : n, pair = second > n;
    const int64_t frame_bytes =
        shape->convolution[0].in_width * shape->block * shape->convolution[0].in_height * shape->block;
    float(*sums)[32 * 32] = (float(*)[32 * 32])workspace;
    int32_t *words = (int32_t *)(sums + 2);
    uint16_t *in[2] = {(uint16_t *)(words + shape->max_activation), NULL}, *out[2];
    in[1] = in[0] + shape->max_activation;
    out[0] = in[1] + shape->max_activation;
    out[1] = out[0] + shape->max_activation;
    pack_pair(shape, args, n, second, in);
    FramePrefetch ahead = {.count = 0, .bytes = frame_bytes, .next = 0};
    for (int64_t i = next; i < next + 2 && i < args->batch; i++, ahead.count += shape->frames)
        find_frames(shape, args, i, frame_bytes, ahead.frames + ahead.count);
    for (int64_t l = 0; l < shape->convolutions; l++) {
        const ConvShape *conv = &shape->convolution[l];
        const int last = l == shape->convolutions - 1;
        const int64_t units = conv->out_channels, size = conv->out_height * conv->out_width * units;
        const int64_t positions = (conv->out_height - 1) * (conv->in_width / conv->stride) + conv->out_width;
        int32_t *saved = args->saved_input[l + 1] ? args->saved_input[l + 1] + n / 2 * size : NULL;
        const LayerOutput output = {.out = {out[0], out[1]}, .next = last ? NULL : conv + 1, .words = last ? words : saved};
        ahead.share = l ? 0 : 2 * shape->frames * frame_bytes / 64 / ((positions + 31) / 32 * ((units + 31) / 32)) + 1;
        for (int64_t u = 0; u < units; u += 32) {
            const int b_tiles = tiles_of(units - u);
            for (int64_t p = 0; p < positions; p += 32) {
                const int a_tiles = tiles_of(positions - p);
                prefetch_frames(&ahead);
                for (int i = 0; i < 1 + pair; i++)
                    DISPATCH_TILES(a_tiles, b_tiles, plane_sums, conv, in[i], args->conv_weight[l], p, u, sums[i]);
                store_block(conv, args->conv_bias[l], pair, sums, p, positions - p < 32 ? positions - p : 32, u,
                            b_tiles, &output);
            }
        }
        if (last) {
            uint16_t *flat = (uint16_t *)args->flat;
            store_flat(conv, words, flat + n * size, pair ? flat + second * size : NULL, saved);
        }
        for (int i = 0; i < 2; i++) {
            uint16_t *swapped = in[i];
            in[i] = out[i];
            out[i] = swapped;
        }
    }
}

/* Words [word, word + 16) of the hidden layer's input, of all observations:
 * for w, n: flat_columns[w][n] = the pair flat[n][2 w], flat[n][2 w + 1] */
void transpose_flat(const NetworkShape *shape, const ForwardArgs *args, int64_t word) {
    const int64_t columns = whole_tiles(args->batch), words = shape->flat / 2;
    const int32_t *flat = (const int32_t *)args->flat + word;
    for (int64_t n = 0; n < args->batch; n += 16) {
        const int32_t *rows[16];
        Floats block[16][VECTORS];
        for (int i = 0; i < 16; i++) rows[i] = n + i < args->batch ? flat + (n + i) * words : NULL;
        load_transposed(rows, block);
        for (int j = 0; j < 16; j++) store_floats(args->flat_columns + (word + j) * columns + n, block[j][0]);
    }
}

/* 16 * a_tiles units and 16 * b_tiles observations of tile_hidden_forward, row-major with 32 in a row. Weights of the
 * steps ahead are prefetched: each row of a tile is another stream of memory. */
ALWAYS_INLINE void hidden_sums(const int a_tiles, const int b_tiles, const uint16_t *weight, int64_t flat,
                               const int32_t *columns, int64_t batch, float *sums) {
    zero_sums(a_tiles, b_tiles);
    for (int64_t k = 0; k < flat; k += 32) {
        for (int i = 0; i < 16 * a_tiles; i++) __builtin_prefetch(weight + i * flat + k + 8 * 32, 0, 3);
        add_products(a_tiles, b_tiles, weight + k, flat * 2, 0, columns + k / 2 * batch, batch * 4, 0, 1);
    }
    store_sums(a_tiles, b_tiles, sums, 128);
}

/* The hidden layer's units [first, first + 32), or to the end, for all observations:
 * for n, u: hidden[n][u] = max(0, hidden_bias[u] + sum over k: hidden_weight[u][k] * flat[n][k])
 * Sums that will be normalized are left without bias and ReLU. */
void tile_hidden_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t first) {
    const int64_t flat = shape->flat, hidden = shape->hidden, columns = whole_tiles(args->batch);
    const uint16_t *weight = (const uint16_t *)args->hidden_weight + first * flat;
    const Normalization *norm = args->normalization[shape->convolutions];
    float *out = norm && norm->sums ? norm->sums : args->hidden;
    const int a_tiles = tiles_of(hidden - first);
    float sums[32 * 32];
    for (int64_t n = 0; n < args->batch; n += 32) {
        const int b_tiles = tiles_of(args->batch - n);
        DISPATCH_TILES(a_tiles, b_tiles, hidden_sums, weight, flat, args->flat_columns + n, columns, sums);
        for (int64_t u = 0; u < 16 * a_tiles; u += 16) {
            const Floats bias = load_floats(args->hidden_bias + first + u);
            for (int64_t m = 0; m < 16 * b_tiles; m += 16) {
                const int32_t *rows[16];
                Floats block[16][VECTORS];
                for (int i = 0; i < 16; i++) rows[i] = (const int32_t *)sums + (u + i) * 32 + m;
                load_transposed(rows, block);
                for (int64_t j = 0; j < 16 && n + m + j < args->batch; j++)
                    store_floats(out + (n + m + j) * hidden + first + u,
                                 norm ? block[j][0] : relu(block[j][0] + bias));
            }
        }
    }
    if (needs_batch(norm)) batch_statistics(norm, args->batch, first, 16 * a_tiles);
}
#endif
