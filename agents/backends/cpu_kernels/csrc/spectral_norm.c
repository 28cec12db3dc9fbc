/* Spectral normalization (Miyato et al. 2018): w = c v / sigma, with V the matrix (units, inputs) of v.
 *
 * A training pass makes steps of power iteration, left = V right / |V right| and right = V' left / |V' left|, and
 * divides by sigma = left' V right, through which the gradient passes with both vectors fixed:
 * dv[u][i] = c[u] / sigma dw[u][i] - sum(dw * w) / sigma left[u] right[i]
 *
 * The functions are called by all threads of a team. Each number is computed by one thread in one order, so no result
 * depends on the number of threads.
 */
#include "spectral_norm.h"
#include <math.h>
#include "optimizer.h"

#define COLUMNS 64 /* inputs whose sums over the units one thread takes at a time */

/* x / max(|x|, eps) to `out`; returns what it was divided by. */
static float normalize(const float *x, int64_t count, float eps, float *out) {
    const float norm = sqrtf(dot(x, x, count)), length = norm > eps ? norm : eps;
    for (int64_t i = 0; i < count; i++) out[i] = x[i] / length;
    return length;
}

/* product[u] = sum over i: v[u][i] right[i] */
static void multiply_by_right(const TrainedLayer *layer) {
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < layer->units; unit++)
        layer->product[unit] = dot(layer->v + unit * layer->inputs, layer->right, layer->inputs);
}

/* product[units + i] = sum over u: v[u][i] left[u] */
static void multiply_by_left(const TrainedLayer *layer) {
#pragma omp for schedule(static)
    for (int64_t from = 0; from < layer->inputs; from += COLUMNS) {
        const int64_t count = layer->inputs - from < COLUMNS ? layer->inputs - from : COLUMNS;
        float sums[COLUMNS] = {0.0f};
        for (int64_t unit = 0; unit < layer->units; unit++) {
            const float *v = layer->v + unit * layer->inputs + from, left = layer->left[unit];
            if (count == COLUMNS) {
#pragma omp simd
                for (int64_t i = 0; i < COLUMNS; i++) sums[i] += v[i] * left;
            } else {
                for (int64_t i = 0; i < count; i++) sums[i] += v[i] * left;
            }
        }
        for (int64_t i = 0; i < count; i++) layer->product[layer->units + from + i] = sums[i];
    }
}

/* Find sigma, after the steps of power iteration of a training pass if `iterate`. */
void find_singular_vectors(const TrainedLayer *layer, int64_t iterate) {
    float *by_right = layer->product, *by_left = layer->product + layer->units;
    for (int64_t step = 0; iterate && step < layer->iterations; step++) {
        multiply_by_right(layer);
#pragma omp single
        normalize(by_right, layer->units, layer->normalize_eps, layer->left);
        multiply_by_left(layer);
#pragma omp single
        {
            normalize(by_left, layer->inputs, layer->normalize_eps, layer->right);
            *layer->sigma = dot(by_left, layer->right, layer->inputs); /* (V' left)' right = left' V right */
        }
    }
    if (iterate) return;
    multiply_by_right(layer);
#pragma omp single
    *layer->sigma = dot(by_right, layer->left, layer->units);
}

/* sum(dw * w) / sigma, by which left[u] right[i] is taken off a gradient; the units' parts are in `alignment`. */
float spectral_coefficient(const TrainedLayer *layer) {
    float sum = 0.0f;
    for (int64_t unit = 0; unit < layer->units; unit++) sum += layer->alignment[unit];
    return sum / *layer->sigma;
}
