/* Normalization of a layer's sums t between product and bias: y = gain * x, x = (t - mean) * scale.
 *
 * Means and variances over what `over` says (structs.h); a variance is a mean of squared deviations from the mean, so
 * nothing cancels. Every number is computed by one thread in one order, so no result depends on the number of threads.
 * Plain loops over the units of a position, which lie next to each other; the compiler makes vectors of them.
 */
#include "output_normalization.h"
#include <math.h>
#include "scalar.h"

#define LANES 16 /* units that are computed together */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Mean and sum of squared deviations of `count` numbers. The mean is corrected by what its own rounding left over. */
static void mean_and_square(const float *t, int64_t count, float *mean, float *square) {
    float sums[4 * LANES] = {0.0f}, squares[4 * LANES] = {0.0f}, sum = 0.0f, all = 0.0f;
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
#pragma omp simd
        for (int64_t j = 0; j < 4 * LANES; j++) sums[j] += t[i + j];
    }
    for (int64_t j = 0; i < count; i++, j++) sums[j] += t[i];
    for (int64_t j = 0; j < 4 * LANES; j++) sum += sums[j];
    const float first = sum / (float)count;
    memset(sums, 0, sizeof sums);
    for (i = 0; i + 4 * LANES <= count; i += 4 * LANES) {
#pragma omp simd
        for (int64_t j = 0; j < 4 * LANES; j++) {
            const float deviation = t[i + j] - first;
            sums[j] += deviation;
            squares[j] += deviation * deviation;
        }
    }
    for (int64_t j = 0; i < count; i++, j++) {
        const float deviation = t[i] - first;
        sums[j] += deviation;
        squares[j] += deviation * deviation;
    }
    sum = 0.0f;
    for (int64_t j = 0; j < 4 * LANES; j++) {
        sum += sums[j];
        all += squares[j];
    }
    *mean = first + sum / (float)count;
    *square = all - sum * (sum / (float)count);
}

/* Of an observation, for each unit: the mean over the positions and the sum of squared deviations from it. */
void observation_statistics(const Normalization *norm, int64_t n) {
    const int64_t positions = norm->positions, units = norm->units;
    if (positions == 1) return; /* each number is its own mean: observation_mean is `sums` */
    const float *t = norm->sums + n * positions * units;
    for (int64_t u = 0; u < units; u += LANES) {
        float sums[LANES] = {0.0f}, squares[LANES] = {0.0f}, first[LANES];
        for (int64_t p = 0; p < positions; p++) {
#pragma omp simd
            for (int64_t j = 0; j < LANES; j++) sums[j] += t[p * units + u + j];
        }
        for (int64_t j = 0; j < LANES; j++) {
            first[j] = sums[j] / (float)positions;
            sums[j] = 0.0f;
        }
        for (int64_t p = 0; p < positions; p++) {
#pragma omp simd
            for (int64_t j = 0; j < LANES; j++) {
                const float deviation = t[p * units + u + j] - first[j];
                sums[j] += deviation;
                squares[j] += deviation * deviation;
            }
        }
        for (int64_t j = 0; j < LANES; j++) {
            norm->observation_mean[n * units + u + j] = first[j] + sums[j] / (float)positions;
            norm->observation_square[n * units + u + j] = squares[j] - sums[j] * (sums[j] / (float)positions);
        }
    }
}

/* The statistics of units [first, first + count) over a minibatch, from those of its observations, of which each has as
 * many numbers:
 * for u: mean[u] = mean over n: m[n][u];  variance[u] = mean over n: square[n][u] / positions + (m[n][u] - mean[u])^2 */
void batch_statistics(const Normalization *norm, int64_t batch, int64_t first, int64_t count) {
    const int64_t units = norm->units;
    const float positions = (float)norm->positions;
    for (int64_t u = first; u < first + count; u++) {
        float sum = 0.0f, rest = 0.0f, square = 0.0f;
        for (int64_t n = 0; n < batch; n++) sum += norm->observation_mean[n * units + u];
        const float about = sum / (float)batch;
        for (int64_t n = 0; n < batch; n++) {
            const float deviation = norm->observation_mean[n * units + u] - about;
            rest += deviation;
            square += deviation * deviation * positions;
            if (norm->positions > 1) square += norm->observation_square[n * units + u];
        }
        norm->mean[u] = about + rest / (float)batch;
        norm->variance[u] = (square - rest * (rest / (float)batch) * positions) / ((float)batch * positions);
        norm->scale[u] = norm->mean_only ? 1.0f : 1.0f / sqrtf(norm->variance[u] + norm->eps);
    }
}

/* running += rate * (the minibatch's - running), the variance being the unbiased one. */
void update_running_statistics(const Normalization *norm, int64_t batch) {
    const float count = (float)(batch * norm->positions), rate = norm->rate;
    for (int64_t u = 0; u < norm->units; u++) {
        norm->running_mean[u] += rate * (norm->mean[u] - norm->running_mean[u]);
        if (norm->running_var)
            norm->running_var[u] += rate * (norm->variance[u] * (count / (count - 1.0f)) - norm->running_var[u]);
    }
}

/* Mean and scale of up to LANES units from u on, for observation n and, where each has its own, its position p. */
static inline void statistics_at(const Normalization *norm, int64_t n, int64_t p, int64_t u, int64_t count, float *mean,
                                 float *scale) {
    for (int64_t j = 0; j < LANES; j++) {
        mean[j] = 0.0f;
        scale[j] = 1.0f;
    }
    for (int64_t j = 0; j < count; j++) {
        if (norm->over == RUNNING) {
            mean[j] = norm->running_mean[u + j];
            if (!norm->mean_only) scale[j] = 1.0f / sqrtf(norm->running_var[u + j] + norm->eps);
        } else {
            const int64_t at = norm->over == BATCH ? u + j : norm->over == EXAMPLE ? n : n * norm->positions + p;
            mean[j] = norm->mean[at];
            scale[j] = norm->scale[at];
        }
    }
}

/* out[j] = gain[j] * (t[j] - mean) * scale with one mean and scale for all units of a position. */
static inline void normalize_position(const float *gain, int64_t units, float mean, float scale, const float *t,
                                      float *out) {
#pragma omp simd
    for (int64_t u = 0; u < units; u++) out[u] = (t[u] - mean) * scale * gain[u];
}

/* Normalize the sums of observation n, (positions, units), which may be overwritten. Those of an EXAMPLE or POSITION
 * are saved if they will be needed; BATCH finds them saved. */
void normalize(const Normalization *norm, int64_t n, const float *t, float *out) {
    const int64_t positions = norm->positions, units = norm->units, size = positions * units;
    const int64_t own = norm->over == EXAMPLE ? 1 : positions; /* statistics of this observation */
    if (norm->over == EXAMPLE || norm->over == POSITION) {
        if (norm->sums && norm->sums + n * size != t) memcpy(norm->sums + n * size, t, (size_t)size * sizeof(float));
        for (int64_t i = 0; i < own; i++) {
            float mean, square;
            mean_and_square(t + i * units, size / own, &mean, &square);
            const float scale = 1.0f / sqrtf(square / (float)(size / own) + norm->eps);
            for (int64_t p = i; p < i + positions / own; p++)
                normalize_position(norm->gain, units, mean, scale, t + p * units, out + p * units);
            if (!norm->sums) continue;
            norm->mean[n * own + i] = mean;
            norm->scale[n * own + i] = scale;
        }
        return;
    }
    for (int64_t u = 0; u < units; u += LANES) {
        const int64_t count = smaller(units - u, LANES);
        float mean[LANES], scale[LANES];
        statistics_at(norm, n, 0, u, count, mean, scale);
        for (int64_t j = 0; norm->gain && j < count; j++) scale[j] *= norm->gain[u + j];
        for (int64_t p = 0; p < positions; p++) {
            const float *from = t + p * units + u;
            float *to = out + p * units + u;
            if (count == LANES) {
#pragma omp simd
                for (int64_t j = 0; j < LANES; j++) to[j] = (from[j] - mean[j]) * scale[j];
            } else {
                for (int64_t j = 0; j < count; j++) to[j] = (from[j] - mean[j]) * scale[j];
            }
        }
    }
}

/* Normalize the row of a dense layer's sums for observation n, from `sums` if they are saved, into `out`, with bias. */
void normalize_dense(const Normalization *norm, int64_t n, int with_relu, float *out) {
    normalize(norm, n, norm->sums ? norm->sums + n * norm->units : out, out);
#pragma omp simd
    for (int64_t u = 0; u < norm->units; u++) {
        const float y = out[u] + norm->bias[u];
        out[u] = with_relu && y < 0.0f ? 0.0f : y;
    }
}

/* Normalize the output layer's sums, (batch, actions), from `sums` if they are saved. */
void normalize_output(const Normalization *norm, int64_t batch, float *q_values) {
    if (norm->over == BATCH) batch_statistics(norm, batch, 0, norm->units);
    for (int64_t n = 0; n < batch; n++) normalize_dense(norm, n, 0, q_values + n * norm->units);
}

/* What observation n, with gradient dy (positions, units) by y, adds to the gradients of bias and gain:
 * for u: bias_parts[n][u] = sum over p: dy[p][u];  gain_parts[n][u] = sum over p: dy[p][u] * x[p][u] */
void observation_gradients(const Normalization *norm, int64_t n, const float *dy) {
    const int64_t positions = norm->positions, units = norm->units;
    const float *t = norm->sums + n * positions * units;
    for (int64_t u = 0; u < units; u += LANES) {
        const int64_t count = smaller(units - u, LANES);
        float bias[LANES] = {0.0f}, gain[LANES] = {0.0f}, mean[LANES], scale[LANES];
        if (!norm->mean_only) statistics_at(norm, n, 0, u, count, mean, scale);
        for (int64_t p = 0; p < positions; p++) {
            const float *slope = dy + p * units + u, *sum = t + p * units + u;
            if (norm->mean_only) {
#pragma omp simd
                for (int64_t j = 0; j < count; j++) bias[j] += slope[j];
                continue;
            }
            if (norm->over == POSITION && p) statistics_at(norm, n, p, u, count, mean, scale);
            if (count == LANES) {
#pragma omp simd
                for (int64_t j = 0; j < LANES; j++) {
                    bias[j] += slope[j];
                    gain[j] += slope[j] * ((sum[j] - mean[j]) * scale[j]);
                }
            } else {
                for (int64_t j = 0; j < count; j++) {
                    bias[j] += slope[j];
                    gain[j] += slope[j] * ((sum[j] - mean[j]) * scale[j]);
                }
            }
        }
        for (int64_t j = 0; j < count; j++) {
            norm->bias_parts[n * units + u + j] = bias[j];
            if (norm->gain) norm->gain_parts[n * units + u + j] = gain[j];
        }
    }
}

/* The gradients of bias and gain for units [first, first + count): the sums of their parts. */
void unit_gradients(const Normalization *norm, int64_t batch, int64_t first, int64_t count) {
    for (int64_t u = first; u < first + count; u++) norm->bias_gradient[u] = 0.0f;
    for (int64_t u = first; u < first + count && norm->gain; u++) norm->gain_gradient[u] = 0.0f;
    for (int64_t n = 0; n < batch; n++) {
        const float *bias = norm->bias_parts + n * norm->units, *gain = norm->gain_parts + n * norm->units;
        for (int64_t u = first; u < first + count; u++) norm->bias_gradient[u] += bias[u];
        for (int64_t u = first; u < first + count && norm->gain; u++) norm->gain_gradient[u] += gain[u];
    }
}

/* dt of a position whose statistics are those of its observation: scale * (gain * dy - a - x * c). */
static inline void position_gradient(const float *gain, int64_t units, float mean, float scale, float a, float c,
                                     const float *t, const float *dy, float *dt) {
#pragma omp simd
    for (int64_t u = 0; u < units; u++) dt[u] = scale * (gain[u] * dy[u] - a - (t[u] - mean) * scale * c);
}

/* The gradient by the sums of observation n, (positions, units), from that by y; dt may be dy:
 * dt = scale * (gain * dy - mean of (gain * dy) - x * mean of (gain * dy * x)),  or dt = dy - mean of dy
 * with the means over what the statistics are taken of. */
void sums_gradient(const Normalization *norm, int64_t batch, int64_t n, const float *dy, float *dt) {
    const int64_t positions = norm->positions, units = norm->units, size = positions * units;
    const float *t = norm->sums + n * size;
    if (norm->over == EXAMPLE) {
        float a = 0.0f, c = 0.0f;
        for (int64_t u = 0; u < units; u++) {
            a += norm->gain[u] * norm->bias_parts[n * units + u] / (float)size;
            c += norm->gain[u] * norm->gain_parts[n * units + u] / (float)size;
        }
        for (int64_t p = 0; p < positions; p++)
            position_gradient(norm->gain, units, norm->mean[n], norm->scale[n], a, c, t + p * units, dy + p * units,
                              dt + p * units);
        return;
    }
    if (norm->over == POSITION) {
        for (int64_t p = 0; p < positions; p++, t += units, dy += units, dt += units) {
            const float mean = norm->mean[n * positions + p], scale = norm->scale[n * positions + p];
            float a = 0.0f, c = 0.0f;
#pragma omp simd reduction(+ : a, c)
            for (int64_t u = 0; u < units; u++) {
                a += norm->gain[u] * dy[u];
                c += norm->gain[u] * dy[u] * ((t[u] - mean) * scale);
            }
            position_gradient(norm->gain, units, mean, scale, a / (float)units, c / (float)units, t, dy, dt);
        }
        return;
    }
    const float number = (float)(batch * positions);
    for (int64_t u = 0; u < units; u += LANES) {
        const int64_t count = smaller(units - u, LANES);
        float a[LANES] = {0.0f}, c[LANES] = {0.0f}, factor[LANES] = {0.0f}, mean[LANES], scale[LANES];
        for (int64_t j = 0; j < count; j++) a[j] = norm->bias_gradient[u + j] / number;
        if (!norm->mean_only) {
            statistics_at(norm, n, 0, u, count, mean, scale);
            for (int64_t j = 0; j < count; j++) {
                c[j] = norm->gain_gradient[u + j] / number;
                factor[j] = scale[j] * norm->gain[u + j];
            }
        }
        for (int64_t p = 0; p < positions; p++) {
            const float *slope = dy + p * units + u, *sum = t + p * units + u;
            float *to = dt + p * units + u;
            if (norm->mean_only) {
#pragma omp simd
                for (int64_t j = 0; j < count; j++) to[j] = slope[j] - a[j];
                continue;
            }
            if (count == LANES) {
#pragma omp simd
                for (int64_t j = 0; j < LANES; j++)
                    to[j] = factor[j] * (slope[j] - a[j] - (sum[j] - mean[j]) * scale[j] * c[j]);
            } else {
                for (int64_t j = 0; j < count; j++)
                    to[j] = factor[j] * (slope[j] - a[j] - (sum[j] - mean[j]) * scale[j] * c[j]);
            }
        }
    }
}
