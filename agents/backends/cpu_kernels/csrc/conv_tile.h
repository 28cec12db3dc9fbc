/* The sums of a convolution at some positions, used by the forward pass and by the gradient by a layer's input. */
#ifndef CONV_TILE_H
#define CONV_TILE_H
#include "simd.h"
#ifdef VECTOR_KERNELS

/* Sums at `count` positions and for `vectors` vectors of output channels, over `rows` rows of `row_words` words:
 * for p, u: out[p][u] = sum over i, w: at[p][i * row_stride + w] . weight[i * row_words + w][u] */
ALWAYS_INLINE void conv_tile(const Precision precision, const int count, const int vectors, const int32_t *const *at,
                             int64_t rows, int64_t row_stride, int64_t row_words, const int32_t *weight,
                             int64_t channels, float *const *out) {
    Floats sum[MAX_TILE][4];
    UNROLL for (int p = 0; p < count; p++) UNROLL for (int v = 0; v < vectors; v++) sum[p][v] = zeros();
    for (int64_t i = 0; i < rows; i++) {
        const int64_t start = i * row_stride;
        for (int64_t w = 0; w < row_words; w++) {
            Words b[4];
            UNROLL for (int v = 0; v < vectors; v++) b[v] = load_once(weight + VECTOR_LANES * v);
            UNROLL for (int p = 0; p < count; p++) {
                const int32_t a = at[p][start + w];
                UNROLL for (int v = 0; v < vectors; v++) sum[p][v] = multiply_add(precision, sum[p][v], a, b[v]);
            }
            weight += channels;
        }
    }
    UNROLL for (int p = 0; p < count; p++) {
        UNROLL for (int v = 0; v < vectors; v++) store_floats(out[p] + VECTOR_LANES * v, sum[p][v]);
    }
}
#endif
#endif
