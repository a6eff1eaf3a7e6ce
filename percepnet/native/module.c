/* `percepnet.native._path`: the signal path around the network, compiled. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tables.h"

#define ALIGNMENT 64 /* a line of the cache; no vector needs more */

static const char CAPSULE[] = "percepnet.spectra";

enum { NO_GIL_FRAMES = 64 }; /* so many take a while: other threads may run meanwhile */

/* Memory of one call. */
struct work {
    cell *x, *y, *bins;
    float (*combed)[WINDOW];
    float *heard, *correlations, *energies, *frames;
    complex_float *spectra;
};

struct analysis {
    int n_streams, n_frames;
    const long long *rows;
    const float *hops, *mean, *scale;
    float *samples, *old_energies, *scores, *correlations;
    complex_float *old_spectra;
    float *energy, *features, *strength;
    long long *period;
    cell *spectra;
};

struct synthesis {
    int n_streams, n_frames;
    const long long *rows;
    const cell *spectra;
    const float *energy, *gains, *strengths, *wet, *sharpening;
    float *overlap, *enhanced;
};

#include "fft.h"
#include "path.h"

static void fill(struct plan *plan)
{
    complex_float *w = plan->twiddles;
    int n_points = plan->size / 2, n = n_points;
    for (const int *radix = plan->radices; *radix; radix++) {
        int m = n / *radix;
        for (int p = 0; p < m; p++)
            for (int j = 1; j < *radix; j++, w++) {
                double phase = -2 * M_PI * p * j / n;
                w->re = (float)cos(phase);
                w->im = (float)sin(phase);
            }
        n = m;
    }
    for (int k = 0; k <= n_points; k++) {
        double phase = -M_PI * k / n_points;
        plan->half_turn[k].re = (float)cos(phase);
        plan->half_turn[k].im = k == n_points ? 0 : (float)sin(phase);
    }
}

/* The memory of a C-contiguous array of so many bytes, or, if n_bytes < 0, of any whole number of -n_bytes. */
static void *array(PyObject *object, Py_ssize_t n_bytes, int flags, Py_ssize_t *n_items)
{
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_C_CONTIGUOUS | flags))
        return NULL;
    void *memory = view.buf;
    Py_ssize_t length = view.len;
    PyBuffer_Release(&view); /* the caller holds the array */
    if (n_bytes >= 0 ? length != n_bytes : length % -n_bytes) {
        PyErr_Format(PyExc_ValueError, "an array of %zd bytes where %s%zd belong", length,
                     n_bytes < 0 ? "a multiple of " : "", n_bytes < 0 ? -n_bytes : n_bytes);
        return NULL;
    }
    if (n_items)
        *n_items = length / -n_bytes;
    return memory;
}

/* Room in one piece for several arrays, each aligned. */
struct layout {
    char *memory;
    size_t size;
};

static void *place(struct layout *layout, size_t n_bytes)
{
    void *here = layout->memory ? layout->memory + layout->size : NULL;
    layout->size += (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return here;
}

static void lay_out(struct work *work, struct layout *layout, size_t n_streams, size_t n_frames, int analyzes)
{
    size_t n_jobs = n_streams * n_frames;
    work->x = place(layout, sizeof(cell) * PITCH_TRANSFORM / 2);
    work->y = place(layout, sizeof(cell) * PITCH_TRANSFORM / 2);
    work->bins = place(layout, sizeof(cell) * N_BINS);
    work->combed = place(layout, sizeof(float) * LANES * WINDOW);
    if (analyzes) {
        work->heard = place(layout, sizeof(float) * n_streams * (HISTORY + n_frames * HOP));
        work->correlations = place(layout, sizeof(float) * n_jobs * N_LAGS);
        work->energies = place(layout, sizeof(float) * n_jobs * N_BANDS);
        work->spectra = place(layout, sizeof(complex_float) * n_jobs * N_BINS);
    } else {
        work->frames = place(layout, sizeof(float) * n_jobs * WINDOW);
    }
}

static int begin(struct work *work, struct layout *layout, int n_streams, int n_frames, int analyzes)
{
    lay_out(work, layout, n_streams, n_frames, analyzes);
    layout->memory = aligned_alloc(ALIGNMENT, layout->size);
    if (!layout->memory) {
        PyErr_NoMemory();
        return -1;
    }
    layout->size = 0;
    lay_out(work, layout, n_streams, n_frames, analyzes);
    return 0;
}

static void free_spectra(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, CAPSULE));
}

/* Whether the rows of a call lie within a state. */
static int within(const long long *rows, Py_ssize_t n_streams, Py_ssize_t n_rows)
{
    for (Py_ssize_t i = 0; i < n_streams; i++)
        if (rows[i] < 0 || rows[i] >= n_rows) {
            PyErr_Format(PyExc_IndexError, "row %lld of a state of %zd", rows[i], n_rows);
            return 0;
        }
    return 1;
}

#define TAKE(target, object, n_bytes, flags) \
    if (!((target) = array(object, n_bytes, flags, NULL))) \
    return NULL

/* analyze(rows, hops, samples, spectra, energies, scores, correlations, mean, scale, energy, features, period,
   strength) -> spectra */
static PyObject *py_analyze(PyObject *self, PyObject *const *args, Py_ssize_t n_args)
{
    struct analysis a = {0};
    struct work work = {0};
    struct layout layout = {0};
    Py_ssize_t n_streams, n_hops, n_rows;
    if (n_args != 13)
        return PyErr_Format(PyExc_TypeError, "%zd arguments where 13 belong", n_args);
    if ((n_streams = PyObject_Size(args[1])) < 0)
        return NULL;
    TAKE(a.rows, args[0], sizeof(long long) * n_streams, 0);
    if (!(a.hops = array(args[1], -(Py_ssize_t)sizeof(float) * HOP, 0, &n_hops)))
        return NULL;
    if (!n_streams || !n_hops || n_hops % n_streams || n_hops > 1 << 20)
        return PyErr_Format(PyExc_ValueError, "%zd hops of %zd streams", n_hops, n_streams);
    if (!(a.samples = array(args[2], -(Py_ssize_t)sizeof(float) * HISTORY, PyBUF_WRITABLE, &n_rows)))
        return NULL;
    if (!within(a.rows, n_streams, n_rows))
        return NULL;
    Py_ssize_t row = sizeof(float) * n_rows, job = sizeof(float) * n_hops;
    TAKE(a.old_spectra, args[3], row * 2 * LOOKAHEAD_FRAMES * N_BINS, PyBUF_WRITABLE);
    TAKE(a.old_energies, args[4], row * LOOKAHEAD_FRAMES * N_BANDS, PyBUF_WRITABLE);
    TAKE(a.scores, args[5], row * N_PERIODS, PyBUF_WRITABLE);
    TAKE(a.correlations, args[6], row * N_LAGS, PyBUF_WRITABLE);
    TAKE(a.mean, args[7], sizeof(float) * N_FEATURES, 0);
    TAKE(a.scale, args[8], sizeof(float) * N_FEATURES, 0);
    TAKE(a.energy, args[9], job * N_BANDS, PyBUF_WRITABLE);
    TAKE(a.features, args[10], job * N_FEATURES, PyBUF_WRITABLE);
    TAKE(a.period, args[11], 2 * job, PyBUF_WRITABLE);
    TAKE(a.strength, args[12], job, PyBUF_WRITABLE);
    a.n_streams = (int)n_streams;
    a.n_frames = (int)(n_hops / n_streams);

    size_t n_groups = (n_hops + LANES - 1) / LANES;
    if (!(a.spectra = aligned_alloc(ALIGNMENT, n_groups * 2 * N_BINS * sizeof(cell))))
        return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(a.spectra, CAPSULE, free_spectra);
    if (!capsule) {
        free(a.spectra);
        return NULL;
    }
    if (PyCapsule_SetContext(capsule, (void *)n_hops) || begin(&work, &layout, a.n_streams, a.n_frames, 1)) {
        Py_DECREF(capsule);
        return NULL;
    }
    if (n_hops < NO_GIL_FRAMES) {
        analyze(&a, &work);
    } else {
        Py_BEGIN_ALLOW_THREADS
        analyze(&a, &work);
        Py_END_ALLOW_THREADS
    }
    free(layout.memory);
    return capsule;
}

/* synthesize(rows, spectra, energy, gains, strengths, wet, sharpening, overlap, enhanced) */
static PyObject *py_synthesize(PyObject *self, PyObject *const *args, Py_ssize_t n_args)
{
    struct synthesis a = {0};
    struct work work = {0};
    struct layout layout = {0};
    Py_ssize_t n_streams, n_hops, n_rows;
    if (n_args != 9)
        return PyErr_Format(PyExc_TypeError, "%zd arguments where 9 belong", n_args);
    if ((n_streams = PyObject_Size(args[8])) < 0)
        return NULL;
    TAKE(a.rows, args[0], sizeof(long long) * n_streams, 0);
    if (!(a.spectra = PyCapsule_GetPointer(args[1], CAPSULE)))
        return NULL;
    if (!(a.enhanced = array(args[8], -(Py_ssize_t)sizeof(float) * HOP, PyBUF_WRITABLE, &n_hops)))
        return NULL;
    if (!n_streams || !n_hops || n_hops % n_streams || (Py_ssize_t)PyCapsule_GetContext(args[1]) != n_hops)
        return PyErr_Format(PyExc_ValueError, "%zd hops of %zd streams, other than were analysed", n_hops, n_streams);
    Py_ssize_t job = sizeof(float) * n_hops;
    TAKE(a.energy, args[2], job * N_BANDS, 0);
    TAKE(a.gains, args[3], job * N_BANDS, 0);
    TAKE(a.strengths, args[4], job * N_BANDS, 0);
    a.n_streams = (int)n_streams;
    a.n_frames = (int)(n_hops / n_streams);
    TAKE(a.wet, args[5], job, 0);
    TAKE(a.sharpening, args[6], job, 0);
    if (!(a.overlap = array(args[7], -(Py_ssize_t)sizeof(float) * HOP, PyBUF_WRITABLE, &n_rows)))
        return NULL;
    if (!within(a.rows, n_streams, n_rows) || begin(&work, &layout, a.n_streams, a.n_frames, 0))
        return NULL;
    if (n_hops < NO_GIL_FRAMES) {
        synthesize(&a, &work);
    } else {
        Py_BEGIN_ALLOW_THREADS
        synthesize(&a, &work);
        Py_END_ALLOW_THREADS
    }
    free(layout.memory);
    Py_RETURN_NONE;
}

#define TABLE(name) {#name, tables.name, sizeof tables.name}

/* configure(tables): copy the tables, by their names. */
static PyObject *py_configure(PyObject *self, PyObject *named)
{
    const struct {
        const char *name;
        void *memory;
        size_t size;
    } all[] = {
        TABLE(window), TABLE(passage_window), TABLE(low_pass), TABLE(window_correlation), TABLE(bias),
        TABLE(position), TABLE(jump_cost), TABLE(silence), TABLE(comb_weights), TABLE(comb_offsets),
        TABLE(band_below), TABLE(towards_next), TABLE(energy_floor), TABLE(postfilter_beta),
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        PyObject *given = PyMapping_GetItemString(named, all[i].name);
        if (!given)
            return NULL;
        void *memory = array(given, (Py_ssize_t)all[i].size, 0, NULL);
        if (memory)
            memcpy(all[i].memory, memory, all[i].size);
        Py_DECREF(given);
        if (!memory)
            return NULL;
    }
    fill(&plan_window);
    fill(&plan_passage);
    fill(&plan_lags);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"configure", (PyCFunction)py_configure, METH_O, NULL},
    {"analyze", (PyCFunction)(void (*)(void))py_analyze, METH_FASTCALL, NULL},
    {"synthesize", (PyCFunction)(void (*)(void))py_synthesize, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_path", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__path(void)
{
    return PyModule_Create(&module);
}
