/* uint8 frames as blocks of pixels: a convolution of stride s over pixels is one of stride 1 over blocks of s x s. */
#include "frames.h"
#include "scalar.h"

/* Copy `size` bytes for each block; the compiler makes one instruction of a copy of known size. */
static inline void copy_block_lines(uint8_t *packed, const uint8_t *line, int64_t blocks, int64_t channels,
                                    int64_t size) {
    for (int64_t x = 0; x < blocks; x++) memcpy(packed + x * channels, line + x * size, size);
}

/* Pack one row of blocks, the `block` lines of pixels from frames[f][start] on, as elements
 * (width / block, count * block * block):
 * for x, f, i, j: packed[x][f][i][j] = frames[f][start + i * width + x * block + j] */
void pack_block_row(const uint8_t *const *frames, int64_t start, int64_t count, int64_t width, int64_t block,
                    int64_t bfloat16, void *packed) {
    const int64_t blocks = width / block, channels = count * block * block;
    uint8_t pixels[blocks * channels];
    for (int64_t f = 0; f < count; f++) {
        for (int64_t y = 0; y < block; y++) {
            uint8_t *first = pixels + (f * block + y) * block;
            const uint8_t *line = frames[f] + start + y * width;
            if (block == 4)
                copy_block_lines(first, line, blocks, channels, 4);
            else
                copy_block_lines(first, line, blocks, channels, block);
        }
    }
    if (bfloat16) {
        uint16_t *out = packed;
        for (int64_t i = 0; i < blocks * channels; i++) {
            float value = (float)pixels[i];
            uint32_t bits;
            memcpy(&bits, &value, 4);
            out[i] = (uint16_t)(bits >> 16); /* exact: eight bits hold 0 to 255 */
        }
    } else {
        float *out = packed;
        for (int64_t i = 0; i < blocks * channels; i++) out[i] = (float)pixels[i];
    }
}

/* Pack whole observations: uint8 frames at batch_stride and frame_stride, (height, width) each, become elements
 * (batch, height / block, width / block, count * block * block). */
void pack_frames(const uint8_t *frames, int64_t batch_stride, int64_t frame_stride, int64_t batch, int64_t count,
                 int64_t height, int64_t width, int64_t block, int64_t bfloat16, int64_t threads, void *packed) {
    const int64_t rows = height / block, row_elements = width * count * block;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < batch * rows; row++) {
        const uint8_t *of[count];
        for (int64_t f = 0; f < count; f++) of[f] = frames + row / rows * batch_stride + f * frame_stride;
        pack_block_row(of, row % rows * block * width, count, width, block, bfloat16,
                       (uint8_t *)packed + row * row_elements * (bfloat16 ? 2 : 4));
    }
}
