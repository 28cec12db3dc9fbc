/* Sums of outer products, of which a weight's gradient consists. */
#ifndef OUTER_PRODUCT_H
#define OUTER_PRODUCT_H
#include "simd.h"
#ifdef VECTOR_KERNELS

/* Add `rows` x `vectors` vectors of sums of products of two arrays of words, which pair observations, over `lines` lines
 * of `count` positions:
 * for line, p, i, u: sums[i][u] += x[line * x_line_stride + p * x_stride + i] . g[(line * count + p) * g_stride + u]
 * With `fresh` the sums start from zero. With `offsets` x is nonzero only at `count` positions of one line, and x and g
 * are read at x + offsets[p][0] and g + offsets[p][1]. */
ALWAYS_INLINE void outer_product_tile(const Precision precision, const int rows, const int vectors, float *sums,
                                      int64_t sums_stride, int fresh, const int32_t *x, int64_t lines,
                                      int64_t x_line_stride, int64_t count, int64_t x_stride, const int32_t *g,
                                      int64_t g_stride, const int32_t (*offsets)[2]) {
    Floats sum[8][4];
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int v = 0; v < vectors; v++)
            sum[i][v] = fresh ? zeros() : load_floats(sums + i * sums_stride + VECTOR_LANES * v);
    }
    for (int64_t line = 0; line < lines; line++) {
        const int32_t *at = x + line * x_line_stride;
        for (int64_t p = 0; p < count; p++) {
            const int32_t *of = offsets ? g + offsets[p][1] : g;
            if (offsets) at = x + offsets[p][0];
            Words b[4];
            UNROLL for (int v = 0; v < vectors; v++) b[v] = load_once(of + VECTOR_LANES * v);
            UNROLL for (int i = 0; i < rows; i++) {
                const int32_t a = at[i];
                UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = multiply_add(precision, sum[i][v], a, b[v]);
            }
            at += x_stride;
            g += offsets ? 0 : g_stride;
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int v = 0; v < vectors; v++) store_floats(sums + i * sums_stride + VECTOR_LANES * v, sum[i][v]);
    }
}
#endif
#endif
