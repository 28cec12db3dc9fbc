/* Power iteration of spectral normalization, and its part of a step; see spectral_norm.c. */
#ifndef SPECTRAL_NORM_H
#define SPECTRAL_NORM_H
#include "structs.h"

void find_singular_vectors(const TrainedLayer *layer, int64_t iterate);
float spectral_coefficient(const TrainedLayer *layer);
#endif
