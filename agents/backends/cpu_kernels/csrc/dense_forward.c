/* The forward pass of the hidden layer, 16 units at a time for all observations, and of the output layer. */
#include "kernels.h"
#include "output_normalization.h"
#include "simd.h"
#ifdef VECTOR_KERNELS

/* `units` x `count` dot products over the words [from, to) of rows of `words` words, bias and ReLU after the last
 * range, unless `bias` is NULL:
 * for u, n: out[n][u] = max(0, bias[u] + sum over k: weight[u][k] . x[n][k])
 * A sum is kept in 16 partial sums, number k % 16, whatever the width of a vector, in `sums` between two ranges, and
 * these are added at the end. */
ALWAYS_INLINE void dot_tile(const Precision precision, const int units, const int count, const int32_t *weight,
                            const int32_t *x, int64_t words, int64_t from, int64_t to, float *sums, const float *bias,
                            float *out, int64_t out_stride) {
    Floats sum[DOT_UNITS][DOT_OBSERVATIONS][VECTORS];
    UNROLL for (int u = 0; u < units; u++) {
        UNROLL for (int n = 0; n < count; n++) {
            const float *kept = sums + 16 * (u * count + n);
            UNROLL for (int v = 0; v < VECTORS; v++)
                sum[u][n][v] = from ? load_floats(kept + VECTOR_LANES * v) : zeros();
        }
    }
    for (int64_t k = from; k < to; k += 16) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            Words a[DOT_UNITS];
            UNROLL for (int u = 0; u < units; u++) a[u] = load_once(weight + u * words + k + VECTOR_LANES * v);
            UNROLL for (int n = 0; n < count; n++) {
                const Words b = load_once(x + n * words + k + VECTOR_LANES * v);
                UNROLL for (int u = 0; u < units; u++)
                    sum[u][n][v] = multiply_add_vectors(precision, sum[u][n][v], a[u], b);
            }
        }
    }
    UNROLL for (int u = 0; u < units; u++) {
        UNROLL for (int n = 0; n < count; n++) {
            if (to < words) {
                store_16(sums + 16 * (u * count + n), sum[u][n]);
            } else {
                const float value = sum_of_16(sum[u][n]) + (bias ? bias[u] : 0.0f);
                out[n * out_stride + u] = bias && value < 0.0f ? 0.0f : value;
            }
        }
    }
}

/* The hidden layer's units [first, first + 16) for all observations:
 * for n, u: hidden[n][u] = max(0, hidden_bias[u] + sum over k: hidden_weight[u][k] * flat[n][k])
 * DOT_OBSERVATIONS and a range of inputs are taken at a time, so that they stay in the nearest cache for all 16 units.
 * `next` is the unit that this thread probably takes afterwards, whose weights are prefetched. Sums that will be
 * normalized are left without bias and ReLU. */
ALWAYS_INLINE void hidden_forward_template(const Precision precision, const NetworkShape *shape,
                                           const ForwardArgs *args, int64_t first, int64_t next) {
    const int64_t words = shape->flat / pair_size(precision);
    const int64_t range = L1_BYTES / 3 / (DOT_OBSERVATIONS * sizeof(int32_t)) / 16 * 16;
    const int32_t *all = (const int32_t *)args->hidden_weight, *weight = all + first * words;
    const int32_t *x = (const int32_t *)args->flat, *ahead = all + (next < shape->hidden ? next : first) * words;
    const Normalization *norm = args->normalization[shape->convolutions];
    float *sums_out = norm && norm->sums ? norm->sums : args->hidden;
    float sums[16 / DOT_UNITS][DOT_UNITS * DOT_OBSERVATIONS * 16];
    const int64_t tiles = 16 / DOT_UNITS * (args->batch / DOT_OBSERVATIONS + 1) * ((words + range - 1) / range);
    const int64_t share = 16 * words / tiles + 16;
    for (int64_t n = 0; n < args->batch;) {
        const int64_t left = args->batch - n, count = left >= DOT_OBSERVATIONS ? DOT_OBSERVATIONS : left >= 2 ? 2 : 1;
        for (int64_t k = 0; k < words; k += range) {
            const int64_t to = k + range < words ? k + range : words;
            for (int64_t u = 0; u < 16; u += DOT_UNITS) {
                const int64_t stride = shape->hidden;
                const int32_t *w = weight + u * words, *x_n = x + n * words;
                const float *bias = norm ? NULL : args->hidden_bias + first + u;
                float *out = sums_out + n * stride + first + u, *kept = sums[u / DOT_UNITS];
                prefetch_words(&ahead, share);
                if (count == DOT_OBSERVATIONS)
                    dot_tile(precision, DOT_UNITS, DOT_OBSERVATIONS, w, x_n, words, k, to, kept, bias, out, stride);
                else if (count == 2)
                    dot_tile(precision, DOT_UNITS, 2, w, x_n, words, k, to, kept, bias, out, stride);
                else
                    dot_tile(precision, DOT_UNITS, 1, w, x_n, words, k, to, kept, bias, out, stride);
            }
        }
        n += count;
    }
    if (needs_batch(norm)) batch_statistics(norm, args->batch, first, 16);
}

void hidden_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t first, int64_t next) {
    DISPATCH(shape->precision, hidden_forward_template, shape, args, first, next);
}

/* The Q-values of observation n, after the hidden layer's normalization; with one of their own, without their bias:
 * for a: q_values[n][a] = output_bias[a] + sum over u: hidden[n][u] * output_weight[a][u] */
void output_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t n) {
    const Normalization *of_hidden = args->normalization[shape->convolutions];
    const Normalization *norm = args->normalization[shape->convolutions + 1];
    float *out = (norm && norm->sums ? norm->sums : args->q_values) + n * shape->actions;
    if (of_hidden) normalize_dense(of_hidden, n, 1, args->hidden + n * shape->hidden);
    for (int64_t action = 0; action < shape->actions; action++) {
        const float *h = args->hidden + n * shape->hidden, *w = args->output_weight + action * shape->hidden;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t u = 0; u < shape->hidden; u++) sum += h[u] * w[u];
        out[action] = norm ? sum : sum + args->output_bias[action];
    }
}
#endif
