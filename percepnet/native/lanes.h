/* Sixteen frames side by side: every step of the signal path is the same for all, so each works on a vector of them.

GCC and clang turn the vectors into what the processor has: one register with AVX-512, two with AVX, four with SSE or
NEON. No step mixes lanes, so a frame's values do not depend on its neighbours. */

#ifndef LANES_H
#define LANES_H

#define LANES 16

typedef float lanes __attribute__((vector_size(4 * LANES)));

/* A complex number of each frame. */
typedef struct {
    lanes re, im;
} cell;

typedef struct {
    float re, im;
} complex_float;

/* The first and the second halves of two vectors, interleaved. */
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
typedef int lane_numbers __attribute__((vector_size(4 * LANES)));
#define ZIP_LOW(a, b) __builtin_shuffle(a, b, (lane_numbers){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define ZIP_HIGH(a, b) \
    __builtin_shuffle(a, b, (lane_numbers){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif

#endif
