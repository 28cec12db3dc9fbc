/* Normalization of a layer's sums between product and bias, forward and backward; see output_normalization.c. */
#ifndef OUTPUT_NORMALIZATION_H
#define OUTPUT_NORMALIZATION_H
#include "structs.h"

/* Forward: observation_statistics of each observation, then batch_statistics, both for BATCH alone; then normalize. */
void observation_statistics(const Normalization *norm, int64_t n);
void batch_statistics(const Normalization *norm, int64_t batch, int64_t first, int64_t count);
void normalize(const Normalization *norm, int64_t n, const float *t, float *out);
void normalize_dense(const Normalization *norm, int64_t n, int with_relu, float *out);
void normalize_output(const Normalization *norm, int64_t batch, float *q_values);

/* Backward: observation_gradients, then unit_gradients (BATCH needs them first), then sums_gradient. */
void observation_gradients(const Normalization *norm, int64_t n, const float *dy);
void unit_gradients(const Normalization *norm, int64_t batch, int64_t first, int64_t count);
void sums_gradient(const Normalization *norm, int64_t batch, int64_t n, const float *dy, float *dt);
void hidden_output_gradient(const NetworkShape *shape, const ForwardArgs *args, const float *q_gradient, int64_t n);
void hidden_sums_gradient(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t n);
void output_sums_gradient(const Normalization *norm, int64_t batch, const float *q_gradient);

void update_running_statistics(const Normalization *norm, int64_t batch);

/* Whether a layer's statistics are those of the minibatch, so that all observations must come this far first. */
static inline int needs_batch(const Normalization *norm) { return norm && norm->over == BATCH; }
#endif
