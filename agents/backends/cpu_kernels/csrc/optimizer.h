/* The Adamax step of a trained layer and its packed weight, unit by unit; see optimizer.c. */
#ifndef OPTIMIZER_H
#define OPTIMIZER_H
#include "structs.h"

typedef struct {
    float step_size; /* learning rate / (1 - beta1^t) */
    float beta1, beta2, eps;
} Adamax;

void step_unit(const TrainedLayer *layer, int64_t unit, float *row, const Adamax *adamax);
float packed_scale(const TrainedLayer *layer, int64_t unit);
void step_and_pack_unit(const TrainedLayer *layer, int64_t unit, float *row, const Adamax *adamax);
void gather_step_and_pack_unit(const TrainedLayer *layer, int64_t unit, float *row, const Adamax *adamax);
#endif
