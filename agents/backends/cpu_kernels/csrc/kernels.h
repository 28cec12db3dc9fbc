/* The kernels that update.c shares out among threads, each for a part of a minibatch or of a layer. */
#ifndef KERNELS_H
#define KERNELS_H
#include "optimizer.h"
#include "structs.h"

/* conv_forward.c, dense_forward.c */
void conv_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t from, int64_t n, int64_t next,
                  uint8_t *workspace);
void hidden_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t first, int64_t next);
void output_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t n);

/* dense_backward.c, conv_input_backward.c, conv_weight_backward.c */
void output_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                     const TrainedLayer *output, int64_t action);
void hidden_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t n);
void find_hidden_alignment(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                           const TrainedLayer *layer);
void flat_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t first,
                   int64_t next, uint8_t *workspace);
void hidden_weight_step(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                        const TrainedLayer *layer, int64_t first, float *rows, const OptimizerStep *step);
void conv_input_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t from,
                         int64_t n, uint8_t *workspace);
void conv_weight_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t l,
                          int64_t line);

void conv_step(const TrainedLayer *layer, int64_t precision, int64_t first, uint8_t *workspace, const OptimizerStep *step);
#endif
