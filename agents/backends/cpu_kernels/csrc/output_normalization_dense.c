/* The backward pass of a hidden layer and an output layer whose sums are normalized. */
#include "output_normalization.h"
#include "scalar.h"

/* The gradient by the hidden layer's y, of observation n, and what it adds to the gradients of bias and gain:
 * for u: gradient[n][u] = hidden[n][u] > 0 ? sum over a: q_gradient[n][a] * output_weight[a][u] : 0 */
void hidden_output_gradient(const NetworkShape *shape, const ForwardArgs *args, const float *q_gradient, int64_t n) {
    const Normalization *norm = args->normalization[shape->convolutions];
    const int64_t units = shape->hidden;
    const float *h = args->hidden + n * units;
    float *dy = norm->gradient + n * units;
    memset(dy, 0, (size_t)units * sizeof(float));
    for (int64_t action = 0; action < shape->actions; action++) {
        const float slope = q_gradient[n * shape->actions + action], *weight = args->output_weight + action * units;
#pragma omp simd
        for (int64_t u = 0; u < units; u++) dy[u] += slope * weight[u];
    }
    /* The gradient passes a unit that is NaN. */
#pragma omp simd
    for (int64_t u = 0; u < units; u++) dy[u] = h[u] <= 0.0f ? 0.0f : dy[u];
    observation_gradients(norm, n, dy);
}

/* hidden_gradient and hidden_gradient_pairs of observations n and n + 1, from the gradients by y. */
void hidden_sums_gradient(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t n) {
    const Normalization *norm = args->normalization[shape->convolutions];
    const int64_t units = shape->hidden, pair = n + 1 < args->batch;
    float *first = norm->gradient + n * units, *second = first + units;
    for (int64_t i = 0; i < 1 + pair; i++) {
        float *row = i ? second : first;
        sums_gradient(norm, args->batch, n + i, row, row);
        if (shape->precision == FLOAT32) {
            memcpy((float *)back->hidden_gradient + (n + i) * units, row, (size_t)units * sizeof(float));
            memcpy(back->hidden_gradient_pairs + (n + i) * units, row, (size_t)units * sizeof(float));
        } else {
            uint16_t *out = (uint16_t *)back->hidden_gradient + (n + i) * units;
#pragma omp simd
            for (int64_t u = 0; u < units; u++) out[u] = to_bfloat16(row[u]);
        }
    }
    if (shape->precision == FLOAT32) return;
    const uint16_t *low = (const uint16_t *)back->hidden_gradient + n * units, *high = low + units;
    int32_t *words = back->hidden_gradient_pairs + n / 2 * units;
    if (pair) {
#pragma omp simd
        for (int64_t u = 0; u < units; u++) words[u] = (int32_t)(low[u] | (uint32_t)high[u] << 16);
    } else {
        for (int64_t u = 0; u < units; u++) words[u] = low[u];
    }
}

/* The gradient by the output layer's sums, into `gradient`, and those of its bias and gain, from dL/dQ. */
void output_sums_gradient(const Normalization *norm, int64_t batch, const float *q_gradient) {
    const int64_t units = norm->units;
    for (int64_t n = 0; n < batch; n++) observation_gradients(norm, n, q_gradient + n * units);
    unit_gradients(norm, batch, 0, units);
    for (int64_t n = 0; n < batch; n++)
        sums_gradient(norm, batch, n, q_gradient + n * units, norm->gradient + n * units);
}
