/* The backward pass of the output layer and the hidden layer, and the hidden layer's step. */
#include "kernels.h"
#include "outer_product.h"
#ifdef VECTOR_KERNELS

static const uint16_t FIRST_OF_PAIRS[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
static const uint16_t LAST_OF_PAIRS[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};

/* The gradient of one action's output weights and bias, into `output`:
 * for u: packed_gradient[action][u] = sum over n: q_gradient[n][action] * hidden[n][u] */
void output_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                     const TrainedLayer *output, int64_t action) {
    float *row = (float *)output->packed_gradient + action * shape->hidden, bias = 0.0f;
    memset(row, 0, shape->hidden * sizeof(float));
    for (int64_t n = 0; n < args->batch; n++) {
        const float slope = back->q_gradient[n * shape->actions + action];
        const float *h = args->hidden + n * shape->hidden;
        for (int64_t u = 0; u < shape->hidden; u++) row[u] += slope * h[u];
        bias += slope;
    }
    ((float *)output->bias_gradient)[action] = bias;
}

/* The gradient by the hidden layer's sums, of observations n and n + 1:
 * for i, u: hidden_gradient[i][u] = hidden[i][u] > 0 ? sum over a: q_gradient[i][a] * output_weight[a][u] : 0 */
ALWAYS_INLINE void hidden_backward_template(const Precision precision, const NetworkShape *shape,
                                            const ForwardArgs *args, const BackwardArgs *back, int64_t n) {
    const int64_t pair = n + 1 < args->batch, hidden = shape->hidden;
    int32_t *words = back->hidden_gradient_pairs + n / pair_size(precision) * hidden;
    int32_t *second = pair ? words + hidden : NULL;
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t u = 0; u < hidden; u += 16) {
        __m512 sum[2] = {zero, zero};
        for (int64_t i = 0; i < 1 + pair; i++) {
            for (int64_t action = 0; action < shape->actions; action++) {
                const __m512 slope = _mm512_set1_ps(back->q_gradient[(n + i) * shape->actions + action]);
                sum[i] = _mm512_fmadd_ps(slope, _mm512_loadu_ps(args->output_weight + action * hidden + u), sum[i]);
            }
            /* "Not less or equal": the gradient passes a unit that is NaN. */
            const __m512 h = _mm512_loadu_ps(args->hidden + (n + i) * hidden + u);
            sum[i] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(h, zero, _CMP_NLE_UQ), sum[i]);
            store_elements(precision, element_at(precision, back->hidden_gradient, (n + i) * hidden + u), sum[i]);
        }
        store_observations(precision, words + u, second ? second + u : NULL, sum[0], sum[1]);
    }
}

void hidden_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t n) {
    DISPATCH(shape->precision, hidden_backward_template, shape, args, back, n);
}

/* What the step of a hidden layer with spectral normalization needs first, without its gradient: a unit's sums are w.x +
 * bias, so the sum over its inputs of dL/dw * w is, over the observations,
 * for u: alignment[u] = sum over n: hidden_gradient[n][u] * (hidden[n][u] - bias[u])
 * Called by all threads of a team. */
void find_hidden_alignment(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                           const TrainedLayer *layer) {
#pragma omp for schedule(static)
    for (int64_t u = 0; u < shape->hidden; u++) {
        float sum = 0.0f;
        for (int64_t n = 0; n < args->batch; n++) {
            const int64_t at = n * shape->hidden + u;
            const float slope = shape->precision == BFLOAT16
                                    ? from_bfloat16(((const uint16_t *)back->hidden_gradient)[at])
                                    : ((const float *)back->hidden_gradient)[at];
            if (slope != 0.0f) sum += slope * (args->hidden[at] - args->hidden_bias[u]);
        }
        layer->alignment[u] = sum;
    }
}

/* Sums for `count` observations and 32 inputs over the hidden units, `words` words of them:
 * for n, k: out[n][k] = sum over w: hidden[n][w] . weight[w][k] */
ALWAYS_INLINE void flat_tile(const Precision precision, const int count, const int32_t *weight, int64_t weight_stride,
                             const int32_t *hidden, int64_t words, float *out, int64_t out_stride) {
    __m512 sum[8][2];
    UNROLL for (int n = 0; n < count; n++) sum[n][0] = sum[n][1] = _mm512_setzero_ps();
    for (int64_t w = 0; w < words; w++) {
        const __m512i b0 = load_once(weight + w * weight_stride), b1 = load_once(weight + w * weight_stride + 16);
        UNROLL for (int n = 0; n < count; n++) {
            const int32_t a = hidden[n * words + w];
            sum[n][0] = multiply_add(precision, sum[n][0], a, b0);
            sum[n][1] = multiply_add(precision, sum[n][1], a, b1);
        }
    }
    UNROLL for (int n = 0; n < count; n++) {
        _mm512_storeu_ps(out + n * out_stride, sum[n][0]);
        _mm512_storeu_ps(out + n * out_stride + 16, sum[n][1]);
    }
}

/* The gradient by the hidden layer's inputs [first, first + 32) for all observations:
 * for n, k: flat_gradient[n][k] = sum over u: hidden_gradient[n][u] * hidden_weight[u][k]
 * In bfloat16 the weights are paired by units in the workspace first. `next` is the input that this thread probably
 * takes afterwards, whose weights, one cache line in each row, are prefetched. */
ALWAYS_INLINE void flat_backward_template(const Precision precision, const NetworkShape *shape,
                                          const ForwardArgs *args, const BackwardArgs *back, int64_t first,
                                          int64_t next, uint8_t *workspace) {
    const int64_t words = shape->hidden / pair_size(precision), batch = args->batch, flat = shape->flat;
    const int32_t *weight = (const int32_t *)args->hidden_weight + first;
    const int32_t *hidden = (const int32_t *)back->hidden_gradient;
    int64_t weight_stride = flat;
    if (precision == BFLOAT16) {
        const uint16_t *rows = (const uint16_t *)args->hidden_weight + first;
        int32_t *tile = (int32_t *)workspace;
        const __m512i low = _mm512_loadu_si512(FIRST_OF_PAIRS), high = _mm512_loadu_si512(LAST_OF_PAIRS);
        for (int64_t w = 0; w < words; w++) {
            const __m512i a = _mm512_loadu_si512(rows + 2 * w * flat);
            const __m512i b = _mm512_loadu_si512(rows + (2 * w + 1) * flat);
            _mm512_storeu_si512(tile + 32 * w, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(tile + 32 * w + 16, _mm512_permutex2var_epi16(a, high, b));
        }
        weight = tile;
        weight_stride = 32;
    }
    int64_t n = 0, unit = next < flat ? 0 : shape->hidden;
    const int64_t share = shape->hidden / (batch / 8 + 1) + 1;
    float *out = back->flat_gradient + first;
    for (; n + 8 <= batch; n += 8) {
        for (int64_t i = 0; i < share && unit < shape->hidden; i++, unit++)
            __builtin_prefetch(element_at(precision, args->hidden_weight, unit * flat + next), 0, 3);
        flat_tile(precision, 8, weight, weight_stride, hidden + n * words, words, out + n * flat, flat);
    }
    for (; n < batch; n++)
        flat_tile(precision, 1, weight, weight_stride, hidden + n * words, words, out + n * flat, flat);
}

void flat_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t first,
                   int64_t next, uint8_t *workspace) {
    DISPATCH(shape->precision, flat_backward_template, shape, args, back, first, next, workspace);
}

/* The gradient of the hidden layer's units [first, first + 8), and at once their step, so that it stays in the cache:
 * for u, k: rows[u][k] = sum over n: hidden_gradient[n][first + u] * flat[n][k];  then step_and_pack_unit */
ALWAYS_INLINE void hidden_weight_step_template(const Precision precision, const NetworkShape *shape,
                                               const ForwardArgs *args, const BackwardArgs *back,
                                               const TrainedLayer *layer, int64_t first, float *rows,
                                               const OptimizerStep *step) {
    const int64_t pair = pair_size(precision), groups = (args->batch + pair - 1) / pair;
    const int64_t flat = shape->flat, hidden = shape->hidden;
    const int32_t *saved = args->saved_input[shape->convolutions], *x = back->hidden_gradient_pairs + first;
    for (int64_t k = 0; k < flat;) {
        const int vectors = k + 48 <= flat ? 3 : 1;
        /* What the step will read is prefetched while the gradient is computed. */
        for (int64_t u = 0; u < 8; u++) {
            for (int64_t i = k; i < k + 16 * vectors; i += 16) {
                const int64_t at = (first + u) * flat + i;
                __builtin_prefetch(layer->v + at, 1, 2);
                __builtin_prefetch(layer->v_moment1 + at, 1, 2);
                __builtin_prefetch(layer->v_moment2 + at, 1, 2);
            }
        }
        if (vectors == 3)
            outer_product_tile(precision, 8, 3, rows + k, flat, 1, x, 1, 0, groups, hidden, saved + k, flat, NULL);
        else
            outer_product_tile(precision, 8, 1, rows + k, flat, 1, x, 1, 0, groups, hidden, saved + k, flat, NULL);
        k += 16 * vectors;
    }
    for (int64_t u = 0; u < 8; u++) {
        float sum = 0.0f;
        for (int64_t n = 0; n < args->batch; n++) {
            const void *value = element_at(precision, back->hidden_gradient, n * hidden + first + u);
            sum += precision == BFLOAT16 ? from_bfloat16(*(const uint16_t *)value) : *(const float *)value;
        }
        ((float *)layer->bias_gradient)[first + u] = sum;
        step_and_pack_unit(layer, first + u, rows + u * flat, step);
    }
}

void hidden_weight_step(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                        const TrainedLayer *layer, int64_t first, float *rows, const OptimizerStep *step) {
    DISPATCH(shape->precision, hidden_weight_step_template, shape, args, back, layer, first, rows, step);
}
#endif
