/* Sizes and tables of the signal path. Those that Python computes are handed over once, by `configure`. */

#include "lanes.h"

enum {
    HOP = 480,
    WINDOW = 2 * HOP,
    N_BINS = WINDOW / 2 + 1,
    N_BANDS = 34,
    N_FEATURES = 2 * N_BANDS + 2,
    LOOKAHEAD_FRAMES = 2,
    MIN_PERIOD = 96,
    MAX_PERIOD = 768,
    COMB_ORDER = 5,
    N_TAPS = 2 * COMB_ORDER + 1,
    REACH = COMB_ORDER * MAX_PERIOD,
    HISTORY = REACH + WINDOW + LOOKAHEAD_FRAMES * HOP - HOP,

    PASSAGE = 1920,
    DECIMATION = 4,
    PITCH_TRANSFORM = 2880,
    N_LAG_POINTS = PITCH_TRANSFORM / DECIMATION,
    N_PITCH_BINS = N_LAG_POINTS / 2 + 1,
    FIRST_LAG = MIN_PERIOD / DECIMATION,
    N_PERIODS = MAX_PERIOD / DECIMATION - FIRST_LAG + 1,
    N_LAGS = N_PERIODS + 2,

    MAX_PASSES = 8,
};

/* A transform of `size` real samples, as one of half as many complex ones. */
struct plan {
    int size;
    int radices[MAX_PASSES]; /* of the complex transform, then 0 */
    complex_float twiddles[PITCH_TRANSFORM];
    complex_float half_turn[PITCH_TRANSFORM / 2 + 1]; /* exp(-2πik / size) */
};

static struct plan plan_window = {WINDOW, {4, 4, 5, 3, 2}};
static struct plan plan_passage = {PITCH_TRANSFORM, {4, 4, 5, 3, 3, 2}};
static struct plan plan_lags = {N_LAG_POINTS, {4, 5, 3, 3, 2}};

static struct {
    float window[WINDOW];
    float passage_window[PASSAGE];
    float low_pass[N_PITCH_BINS];
    float window_correlation[N_LAGS]; /* at the lags of the candidates and one more on each side */
    float bias[N_PERIODS];
    float position[N_PERIODS];
    float jump_cost[1];
    float silence[1];
    float comb_weights[(MAX_PERIOD + 1) * N_TAPS];
    long long comb_offsets[(MAX_PERIOD + 1) * N_TAPS];
    long long band_below[N_BINS];
    float towards_next[N_BINS];
    float energy_floor[1];
    float postfilter_beta[1];
} tables;
