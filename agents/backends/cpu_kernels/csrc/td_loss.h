/* The transitions of a minibatch and their loss; see td_loss.c. */
#ifndef TD_LOSS_H
#define TD_LOSS_H
#include "structs.h"

int validate_indices(const ReplayStorage *replay, const int64_t *indices, int64_t count, const TDLossArgs *loss,
                     int64_t actions);
void gather_transitions(const ReplayStorage *replay, const int64_t *indices, int64_t batch, const TDLossArgs *loss);
float td_loss(const TDLossArgs *loss, int64_t batch, int64_t actions, const float *q_values,
              const float *next_q_values);
#endif
