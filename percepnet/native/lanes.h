/* Four frames side by side: every step of the signal path is the same for all, so each works on a vector of them.

Four are what a register holds wherever there are vectors (SSE, NEON); GCC and clang need no further hint. Eight with AVX
and sixteen with AVX-512 were a fifth faster with that many frames, and slower with fewer. No step mixes lanes, so a
frame's values do not depend on its neighbours. */

#define LANES 4

typedef float lanes __attribute__((vector_size(4 * LANES)));

/* A complex number of each frame. */
typedef struct {
    lanes re, im;
} cell;

typedef struct {
    float re, im;
} complex_float;

/* The first and the second halves of two vectors, interleaved. */
#ifdef __clang__
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#else
typedef int lane_numbers __attribute__((vector_size(4 * LANES)));
#define ZIP_LOW(a, b) __builtin_shuffle(a, b, (lane_numbers){0, 4, 1, 5})
#define ZIP_HIGH(a, b) __builtin_shuffle(a, b, (lane_numbers){2, 6, 3, 7})
#endif
