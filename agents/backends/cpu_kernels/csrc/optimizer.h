/* The optimizer step of a trained layer and its packed weight, unit by unit; see optimizer.c. */
#ifndef OPTIMIZER_H
#define OPTIMIZER_H
#include "structs.h"

float dot(const float *a, const float *b, int64_t count);
void step_unit(const TrainedLayer *layer, int64_t unit, float *row, const OptimizerStep *step);
float packed_scale(const TrainedLayer *layer, int64_t unit);
void step_and_pack_unit(const TrainedLayer *layer, int64_t unit, float *row, const OptimizerStep *step);
void gather_step_and_pack_unit(const TrainedLayer *layer, int64_t unit, float *row, const OptimizerStep *step);
void prepare_training_pass(const TrainedLayer *layers, int64_t count, int64_t threads);
void find_alignment(const TrainedLayer *layer, float *row);
#endif
