/* uint8 frames as blocks of pixels, the input of the first convolution; see frames.c. */
#ifndef FRAMES_H
#define FRAMES_H
#include "structs.h"

void pack_block_row(const uint8_t *const *frames, int64_t start, int64_t count, int64_t width, int64_t block,
                    int64_t bfloat16, void *packed);
#endif
