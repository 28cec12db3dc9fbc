/* Blocks of pixels that are zero add nothing to a convolution, so they are skipped.
 *
 * Many games draw on black. Output positions whose whole receptive field is zero all have the same sums, so one of
 * them is computed and copied. A row of up to 64 positions is a bit mask; bit x is set where position x is not zero.
 */
#ifndef NONZERO_BLOCKS_H
#define NONZERO_BLOCKS_H
#include "simd.h"
#ifdef VECTOR_KERNELS

/* Output positions to compute, and where: the sums over the receptive field at input[i] go to sums[i]. */
typedef struct {
    const int32_t **input;
    float **sums;
    int64_t count;
} PositionList;

/* The bits [0, count). */
static inline uint64_t first_bits(int64_t count) { return count < 64 ? ((uint64_t)1 << count) - 1 : ~(uint64_t)0; }

/* The mask of a row of `count` blocks, elements (count, channels):
 * for x: bit x = any(blocks[x] != 0) */
ALWAYS_INLINE uint64_t find_nonzero_blocks(const Precision precision, const void *blocks, int64_t count,
                                           int64_t channels) {
    uint64_t nonzero = 0;
    for (int64_t x = 0; x < count; x++) {
        uint64_t any = 0;
        for (int64_t i = 0; i < channels * element_bytes(precision); i += 8) {
            uint64_t some;
            memcpy(&some, (const uint8_t *)element_at(precision, blocks, x * channels) + i, 8);
            any |= some;
        }
        nonzero |= (uint64_t)(any != 0) << x;
    }
    return nonzero;
}

/* From the masks of a convolution's input rows, (in_height), to those of its output rows, (out_height), in place:
 * for y, x: bit x of output y = any bit x * stride + j of input y * stride + i, i and j < kernel */
static inline void propagate_nonzero(const ConvShape *conv, uint64_t *nonzero) {
    for (int64_t y = 0; y < conv->out_height; y++) {
        uint64_t rows = 0, window = 0;
        for (int64_t tap = 0; tap < conv->kernel; tap++) rows |= nonzero[y * conv->stride + tap];
        for (int64_t tap = 0; tap < conv->kernel; tap++) window |= rows >> tap;
        nonzero[y] = 0;
        if (conv->stride == 1) nonzero[y] = window & first_bits(conv->out_width);
        for (int64_t x = 0; conv->stride > 1 && x < conv->out_width; x++)
            nonzero[y] |= (window >> x * conv->stride & 1) << x;
    }
}

/* Append the output positions that `nonzero` has, and the first of the others, whose sums stand for all of them.
 * `input` is words (in_height, in_width, channel_words), `sums` (out_height, out_width, out_channels). */
static inline void list_nonzero_positions(const ConvShape *conv, const int32_t *input, int64_t channel_words,
                                          const uint64_t *nonzero, float *sums, PositionList *list) {
    int zero_rows = 0;
    for (int64_t y = 0; y < conv->out_height; y++, sums += conv->out_width * conv->out_channels) {
        uint64_t wanted = nonzero[y], rest = first_bits(conv->out_width) & ~wanted;
        if (rest && !zero_rows++) wanted |= rest & -rest;
        for (; wanted; wanted &= wanted - 1) {
            const int64_t x = __builtin_ctzll(wanted);
            list->input[list->count] = input + (y * conv->in_width + x) * conv->stride * channel_words;
            list->sums[list->count++] = sums + x * conv->out_channels;
        }
    }
}

/* Copy the sums of the first position that `nonzero` does not have to all others that it does not have. */
static inline void copy_zero_positions(const ConvShape *conv, const uint64_t *nonzero, float *sums) {
    const float *first = NULL;
    for (int64_t y = 0; y < conv->out_height; y++, sums += conv->out_width * conv->out_channels) {
        for (uint64_t zero = first_bits(conv->out_width) & ~nonzero[y]; zero; zero &= zero - 1) {
            float *position = sums + __builtin_ctzll(zero) * conv->out_channels;
            if (!first) first = position;
            for (int64_t u = 0; u < conv->out_channels; u += VECTOR_LANES)
                store_floats(position + u, load_floats(first + u));
        }
    }
}

/* List where column `tap` of the first layer's kernel meets nonzero blocks, in `rows` rows of output positions: the
 * offsets of the block in the input row and of the position in the output. Returns how many, -1 where it is all of
 * them. */
static inline int64_t list_nonzero_taps(const ConvShape *conv, const uint64_t *nonzero, int64_t rows, int64_t tap,
                                        int32_t (*offsets)[2]) {
    const uint64_t all = first_bits(conv->out_width);
    int64_t count = 0, any_zero = 0;
    for (int64_t y = 0; y < rows; y++) any_zero |= (nonzero[y] >> tap & all) != all;
    if (!any_zero) return -1;
    for (int64_t y = 0; y < rows; y++) {
        for (uint64_t left = nonzero[y] >> tap & all; left; left &= left - 1) {
            const int64_t x = __builtin_ctzll(left);
            offsets[count][0] = (int32_t)((y * conv->in_width + x) * conv->in_channels);
            offsets[count++][1] = (int32_t)((y * conv->out_width + x) * conv->out_channels);
        }
    }
    return count;
}
#endif
#endif
