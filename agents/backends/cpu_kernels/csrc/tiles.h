/* The tile unit (Intel AMX) in bfloat16: eight tiles of 16 rows of 64 bytes, and the product of two of them.
 *
 * tile_product(c, a, b) adds to tile c, 16 x 16 sums, the product of tile a, 16 rows of 16 words (pairs along the sum),
 * and tile b, 16 words of the sum x 16 columns. The instruction (TDPBF16PS) adds, of each pair, the first numbers from
 * zero, one after the other with one rounding each, likewise the second, then both together, then those to c; denormals
 * count as zero. So a sum over k is taken 32 elements at a time, where vectors take it two at a time: results differ from
 * theirs by rounding.
 *
 * With the macro TILE_STAND_IN the same primitives are plain C, to test on processors without the unit; with NO_TILES
 * there are none of these kernels.
 *
 * A kernel here computes one stage of an update; NetworkShape.tiles says which stages do, and the rest stay with the
 * kernels over vectors. Rows of a tile are independent of each other, and so are columns: where a tile goes past the end
 * of an array, its last rows or columns are computed from whatever lies there and not used. What is summed over must be
 * zero there in one factor and finite in the other.
 */
#ifndef TILES_H
#define TILES_H
#include "kernels.h"
#include "simd.h"

/* Processors with the unit have AVX512-BF16 too; earlier compilers' assemblers do not know the instructions. */
#if defined(TILE_STAND_IN) || defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#if defined(__AVX512BF16__) && !defined(NO_TILES)
#define TILE_KERNELS 1
#endif
#endif
#ifdef TILE_KERNELS
#define USES_TILES(shape, stage) (((shape)->tiles & (stage)) != 0)
#else
#define USES_TILES(shape, stage) 0
#endif

/* tile_unit.c. All code between the two calls runs in the same thread and uses tiles as it likes. */
void configure_tiles(void);
void release_tiles(void);

/* tile_forward.c, tile_backward.c: as the functions in kernels.h without `tile_`. */
void tile_conv_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t n, int64_t next, uint8_t *workspace);
void transpose_flat(const NetworkShape *shape, const ForwardArgs *args, int64_t word);
void tile_hidden_forward(const NetworkShape *shape, const ForwardArgs *args, int64_t first);
void tile_flat_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t first,
                        int64_t next, uint8_t *workspace);
void tile_hidden_weight_step(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                             const TrainedLayer *layer, int64_t first, float *rows, const OptimizerStep *step);
void tile_convolve(const uint16_t *in, int64_t x_stride, int64_t line, int64_t height, int64_t width, int64_t rows,
                   int64_t row_stride, int64_t row_elements, const int32_t *weight, int64_t channels, float *out);
void tile_conv_sums(const ConvShape *conv, const uint16_t *in, const int32_t *weight, float *sums);
void transpose_conv_gradient(const NetworkShape *shape, const BackwardArgs *back, int64_t n);
void tile_conv_weight_backward(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back, int64_t l,
                               int64_t line, uint8_t *workspace);

#ifdef TILE_KERNELS
#ifdef TILE_STAND_IN
void zero_tile(int tile);
void load_tile(int tile, const void *base, int64_t stride);
void store_tile(int tile, void *base, int64_t stride);
void multiply_tiles(int sums, int a, int b);
#define tile_zero(tile) zero_tile(tile)
#define tile_load(tile, base, stride) load_tile(tile, base, stride)
#define tile_store(tile, base, stride) store_tile(tile, base, stride)
#define tile_product(sums, a, b) multiply_tiles(sums, a, b)
#else
/* Assembler, not the compiler's intrinsics: those need the whole function to be compiled for AMX, which -march=native
 * says on a processor that has it only, and some versions of gcc let stores pass them. A tile is a literal number. */
#define tile_zero(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define tile_load(tile, base, stride)                                                                         \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void *)(base)), "r"((int64_t)(stride)) \
                     : "memory")
#define tile_store(tile, base, stride)                                                                             \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void *)(base)), "r"((int64_t)(stride)) \
                     : "memory")
#define tile_product(sums, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)
#endif

/* Sums of a_tiles * 16 rows x b_tiles * 16 columns lie in tiles 0 (and 1 to the right of it), 2 below it (and 3). */
ALWAYS_INLINE void zero_sums(const int a_tiles, const int b_tiles) {
    tile_zero(0);
    if (b_tiles == 2) tile_zero(1);
    if (a_tiles == 2) tile_zero(2);
    if (a_tiles == 2 && b_tiles == 2) tile_zero(3);
}

/* To and from a row-major array whose rows are row_bytes apart. */
ALWAYS_INLINE void load_sums(const int a_tiles, const int b_tiles, const float *sums, int64_t row_bytes) {
    const uint8_t *below = (const uint8_t *)sums + 16 * row_bytes;
    tile_load(0, sums, row_bytes);
    if (b_tiles == 2) tile_load(1, sums + 16, row_bytes);
    if (a_tiles == 2) tile_load(2, below, row_bytes);
    if (a_tiles == 2 && b_tiles == 2) tile_load(3, below + 64, row_bytes);
}

ALWAYS_INLINE void store_sums(const int a_tiles, const int b_tiles, float *sums, int64_t row_bytes) {
    uint8_t *below = (uint8_t *)sums + 16 * row_bytes;
    tile_store(0, sums, row_bytes);
    if (b_tiles == 2) tile_store(1, sums + 16, row_bytes);
    if (a_tiles == 2) tile_store(2, below, row_bytes);
    if (a_tiles == 2 && b_tiles == 2) tile_store(3, below + 64, row_bytes);
}

/* Add `steps` products of 32 elements of the sum each: rows of `a` are a_stride bytes apart, rows of `b` (words of the
 * sum) b_stride, and the next step's tiles lie a_step and b_step bytes further. */
ALWAYS_INLINE void add_products(const int a_tiles, const int b_tiles, const void *a, int64_t a_stride, int64_t a_step,
                                const void *b, int64_t b_stride, int64_t b_step, int64_t steps) {
    const uint8_t *rows = a, *columns = b;
    for (int64_t k = 0; k < steps; k++, rows += a_step, columns += b_step) {
        tile_load(4, rows, a_stride);
        tile_load(6, columns, b_stride);
        if (a_tiles == 2) tile_load(5, rows + 16 * a_stride, a_stride);
        if (b_tiles == 2) tile_load(7, columns + 64, b_stride);
        tile_product(0, 4, 6);
        if (b_tiles == 2) tile_product(1, 4, 7);
        if (a_tiles == 2) tile_product(2, 5, 6);
        if (a_tiles == 2 && b_tiles == 2) tile_product(3, 5, 7);
    }
}

/* Call the version of an ALWAYS_INLINE function for 1 or 2 tiles of rows and of columns. */
#define DISPATCH_TILES(a_tiles, b_tiles, function, ...)                                       \
    ((a_tiles) == 2 ? ((b_tiles) == 2 ? function(2, 2, __VA_ARGS__) : function(2, 1, __VA_ARGS__)) \
                    : ((b_tiles) == 2 ? function(1, 2, __VA_ARGS__) : function(1, 1, __VA_ARGS__)))

/* Load 16 words of each of 16 rows, transposed: block[j][i] = rows[i][j]. A row that is NULL is zero. */
ALWAYS_INLINE void load_transposed(const int32_t *const *rows, Floats (*block)[VECTORS]) {
    UNROLL for (int i = 0; i < 16; i++) block[i][0] = rows[i] ? load_floats(rows[i]) : zeros();
    transpose_16x16(block);
}

/* How many tiles of 16 the next block of at most two takes, of `left` rows or columns. */
ALWAYS_INLINE int tiles_of(int64_t left) { return left > 16 ? 2 : 1; }

/* `count` rounded up to whole tiles. */
ALWAYS_INLINE int64_t whole_tiles(int64_t count) { return (count + 15) / 16 * 16; }
#endif
#endif
