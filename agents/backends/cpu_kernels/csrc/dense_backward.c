/* The backward pass of the output layer and the hidden layer, and the hidden layer's step. */
#include "kernels.h"
#include "outer_product.h"
#ifdef VECTOR_KERNELS

#ifdef __AVX512BF16__
static const uint16_t FIRST_OF_PAIRS[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
static const uint16_t LAST_OF_PAIRS[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
#endif

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
    if (!args->normalization[shape->convolutions + 1]) ((float *)output->bias_gradient)[action] = bias;
}

/* The gradient by the hidden layer's sums, of observations n and n + 1:
 * for i, u: hidden_gradient[i][u] = hidden[i][u] > 0 ? sum over a: q_gradient[i][a] * output_weight[a][u] : 0 */
ALWAYS_INLINE void hidden_backward_template(const Precision precision, const NetworkShape *shape,
                                            const ForwardArgs *args, const BackwardArgs *back, int64_t n) {
    const int64_t pair = n + 1 < args->batch, hidden = shape->hidden;
    int32_t *words = back->hidden_gradient_pairs + n / pair_size(precision) * hidden;
    int32_t *second = pair ? words + hidden : NULL;
    for (int64_t u = 0; u < hidden; u += VECTOR_LANES) {
        Floats sum[2] = {zeros(), zeros()};
        for (int64_t i = 0; i < 1 + pair; i++) {
            for (int64_t action = 0; action < shape->actions; action++) {
                const Floats slope = broadcast_float(back->q_gradient[(n + i) * shape->actions + action]);
                sum[i] = fused_multiply_add(sum[i], slope, load_floats(args->output_weight + action * hidden + u));
            }
            /* "Not less or equal": the gradient passes a unit that is NaN. */
            const Floats h = load_floats(args->hidden + (n + i) * hidden + u);
            sum[i] = keep_where(~(Words)(h <= zeros()), sum[i]);
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

/* Sums for `count` observations and FLAT_VECTORS vectors of inputs over the hidden units, `words` words of them:
 * for n, k: out[n][k] = sum over w: hidden[n][w] . weight[w][k] */
ALWAYS_INLINE void flat_tile(const Precision precision, const int count, const int32_t *weight, int64_t weight_stride,
                             const int32_t *hidden, int64_t words, float *out, int64_t out_stride) {
    Floats sum[FLAT_OBSERVATIONS][FLAT_VECTORS];
    UNROLL for (int n = 0; n < count; n++) UNROLL for (int v = 0; v < FLAT_VECTORS; v++) sum[n][v] = zeros();
    for (int64_t w = 0; w < words; w++) {
        Words b[FLAT_VECTORS];
        UNROLL for (int v = 0; v < FLAT_VECTORS; v++) b[v] = load_once(weight + w * weight_stride + VECTOR_LANES * v);
        UNROLL for (int n = 0; n < count; n++) {
            const int32_t a = hidden[n * words + w];
            UNROLL for (int v = 0; v < FLAT_VECTORS; v++) sum[n][v] = multiply_add(precision, sum[n][v], a, b[v]);
        }
    }
    UNROLL for (int n = 0; n < count; n++) {
        UNROLL for (int v = 0; v < FLAT_VECTORS; v++) store_floats(out + n * out_stride + VECTOR_LANES * v, sum[n][v]);
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
#ifdef __AVX512BF16__
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
#else
    (void)workspace;
#endif
    int64_t unit = next < flat ? 0 : shape->hidden;
    const int count = batch >= FLAT_OBSERVATIONS ? FLAT_OBSERVATIONS : 1;
    const int64_t inputs = VECTOR_LANES * FLAT_VECTORS, share = shape->hidden / (32 / inputs * batch / count + 1) + 1;
    float *out = back->flat_gradient + first;
    for (int64_t k = 0; k < 32; k += inputs) {
        for (int64_t from = 0; from < batch; from += count) {
            /* The last tile visits observations of the one before it again, and finds the same sums. */
            const int64_t n = from + count <= batch ? from : batch - count;
            const int32_t *w = weight + k, *h = hidden + n * words;
            float *to = out + n * flat + k;
            for (int64_t i = 0; i < share && unit < shape->hidden; i++, unit++)
                __builtin_prefetch(element_at(precision, args->hidden_weight, unit * flat + next), 0, 3);
            if (count == FLAT_OBSERVATIONS)
                flat_tile(precision, FLAT_OBSERVATIONS, w, weight_stride, h, words, to, flat);
            else
                flat_tile(precision, 1, w, weight_stride, h, words, to, flat);
        }
    }
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
        const int vectors = k + 3 * VECTOR_LANES <= flat ? 3 : 1;
        /* What the step will read is prefetched while the gradient is computed. */
        for (int64_t u = 0; u < 8; u++) {
            for (int64_t i = k; i < k + VECTOR_LANES * vectors; i += 16) {
                const int64_t at = (first + u) * flat + i;
                __builtin_prefetch(layer->v + at, 1, 2);
                __builtin_prefetch(layer->v_moment1 + at, 1, 2);
                __builtin_prefetch(layer->v_moment2 + at, 1, 2);
            }
        }
        for (int64_t u = 0; u < 8; u += STEP_ROWS) {
            float *sums = rows + u * flat + k;
            const int32_t *g = saved + k;
            if (vectors == 3)
                outer_product_tile(precision, STEP_ROWS, 3, sums, flat, 1, x + u, 1, 0, groups, hidden, g, flat, NULL);
            else
                outer_product_tile(precision, STEP_ROWS, 1, sums, flat, 1, x + u, 1, 0, groups, hidden, g, flat, NULL);
        }
        k += VECTOR_LANES * vectors;
    }
    for (int64_t u = 0; u < 8; u++) {
        float sum = 0.0f;
        for (int64_t n = 0; n < args->batch; n++) {
            const void *value = element_at(precision, back->hidden_gradient, n * hidden + first + u);
            sum += precision == BFLOAT16 ? from_bfloat16(*(const uint16_t *)value) : *(const float *)value;
        }
        if (!args->normalization[shape->convolutions]) ((float *)layer->bias_gradient)[first + u] = sum;
        step_and_pack_unit(layer, first + u, rows + u * flat, step);
    }
}

void hidden_weight_step(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                        const TrainedLayer *layer, int64_t first, float *rows, const OptimizerStep *step) {
    DISPATCH(shape->precision, hidden_weight_step_template, shape, args, back, layer, first, rows, step);
}
#endif
