// Faults of the disk, made to happen: preloaded (LD_PRELOAD), this library stands between a program
// and the C library in calls that touch files below one directory. It counts them by kind, and lets
// the k-th of a kind fail, write less than it was asked for, or kill the process.
//
// Without a state, which `faults_attach` or the environment's FAULTS_STATE names, each call goes on
// as it came. The state is a file that faults.py writes and that all processes of a case map.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

// As KINDS and the faults of faults.py.
enum { OPEN, READ, WRITE, FSYNC, RENAME, MKDIR, REMOVE, MMAP, ANY, KINDS };
enum { SHORT = 1001, KILL = 1002, TORN = 1003 };  // any smaller number is an errno

struct state {
  char below[1024];     // the directory, absolute and without links
  char where[1024];     // out: the path of the first call that was hit
  int64_t kind, fault;  // which calls count towards k, and what the k-th suffers
  int64_t k;            // from 1 on; 0 only counts
  int64_t hits;         // out
  int64_t counts[KINDS];
};

static struct state *state;

EXPORT void faults_attach(void) {
  const char *path = getenv("FAULTS_STATE");
  if (path == NULL) return;
  int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
  if (file < 0) abort();
  void *map = (void *)syscall(SYS_mmap, NULL, sizeof(struct state), PROT_READ | PROT_WRITE,
                              MAP_SHARED, file, 0);
  if (map == MAP_FAILED) abort();
  syscall(SYS_close, file);
  state = map;
}

__attribute__((constructor)) static void begin(void) { faults_attach(); }

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

// Return what the call suffers: 0 if nothing.
static int fault_of(int kind, const char *path) {
  size_t length = strlen(state->below);
  if (strncmp(path, state->below, length) != 0 || (path[length] != '/' && path[length] != 0))
    return 0;
  int64_t any = __atomic_add_fetch(&state->counts[ANY], 1, __ATOMIC_SEQ_CST);
  int64_t number = __atomic_add_fetch(&state->counts[kind], 1, __ATOMIC_SEQ_CST);
  if (state->kind == ANY) number = any;
  else if (state->kind != kind) return 0;
  if (state->k == 0 || number < state->k) return 0;
  int fault = state->fault;
  // A full disk stays full. All else happens once.
  if (number > state->k && fault != ENOSPC && fault != EDQUOT) return 0;
  if (__atomic_fetch_add(&state->hits, 1, __ATOMIC_SEQ_CST) == 0)
    strncpy(state->where, path, sizeof state->where - 1);
  if (fault == KILL || (fault == TORN && kind != WRITE)) die();
  return fault;
}

static int fault_at(int kind, int directory, const char *path) {
  char whole[PATH_MAX * 2];
  if (state == NULL || path == NULL) return 0;
  int kept = errno;
  if (path[0] == '/') {
    snprintf(whole, sizeof whole, "%s", path);
  } else {
    char link[64];
    if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, whole, PATH_MAX);
    if (size < 0) size = 0;
    snprintf(whole + size, sizeof whole - size, "/%s", path);
  }
  errno = kept;
  return fault_of(kind, whole);
}

static int fault_on(int kind, int file) {
  char link[64], whole[PATH_MAX];
  if (state == NULL || file < 0) return 0;
  int kept = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, whole, sizeof whole - 1);
  errno = kept;
  if (size < 0) return 0;
  whole[size] = 0;
  return fault_of(kind, whole);
}

static int failed(int fault) {
  errno = fault;
  return -1;
}

static int open_at(int directory, const char *path, int flags, mode_t mode) {
  int makes = (flags & O_CREAT) || (flags & __O_TMPFILE);
  int fault = fault_at(makes ? OPEN : READ, directory, path);
  if (fault != 0 && fault < SHORT) return failed(fault);
  return syscall(SYS_openat, directory, path, flags, mode);
}

#define MODE_OF(flags)                          \
  mode_t mode = 0;                              \
  if ((flags) & (O_CREAT | __O_TMPFILE)) {      \
    va_list more;                               \
    va_start(more, flags);                      \
    mode = va_arg(more, mode_t);                \
    va_end(more);                               \
  }

EXPORT int open(const char *path, int flags, ...) {
  MODE_OF(flags)
  return open_at(AT_FDCWD, path, flags, mode);
}
EXPORT int open64(const char *path, int flags, ...) {
  MODE_OF(flags)
  return open_at(AT_FDCWD, path, flags, mode);
}
EXPORT int openat(int directory, const char *path, int flags, ...) {
  MODE_OF(flags)
  return open_at(directory, path, flags, mode);
}
EXPORT int openat64(int directory, const char *path, int flags, ...) {
  MODE_OF(flags)
  return open_at(directory, path, flags, mode);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static FILE *open_stream(const char *name, const char *path, const char *mode) {
  int fault = fault_at(mode[0] == 'r' ? READ : OPEN, AT_FDCWD, path);
  if (fault != 0 && fault < SHORT) {
    errno = fault;
    return NULL;
  }
  return ((__typeof__(&fopen))dlsym(RTLD_NEXT, name))(path, mode);
}
EXPORT FILE *fopen(const char *path, const char *mode) { return open_stream("fopen", path, mode); }
EXPORT FILE *fopen64(const char *path, const char *mode) {
  return open_stream("fopen64", path, mode);
}

// Let a call that writes `size` bytes fail, or return how many of them to write; `dies` is set where
// the process is to be killed behind them.
static ssize_t allowed(int file, size_t size, int *dies) {
  int fault = fault_on(WRITE, file);
  *dies = fault == TORN;
  if (fault == 0) return size;
  if (fault < SHORT) return failed(fault);
  return size > 1 ? size / 2 : size;
}

static ssize_t after(ssize_t written, int dies) {
  if (dies) die();
  return written;
}

EXPORT ssize_t write(int file, const void *bytes, size_t size) {
  int dies;
  ssize_t most = allowed(file, size, &dies);
  return most < 0 ? most : after(syscall(SYS_write, file, bytes, most), dies);
}
EXPORT ssize_t pwrite(int file, const void *bytes, size_t size, off_t at) {
  int dies;
  ssize_t most = allowed(file, size, &dies);
  return most < 0 ? most : after(syscall(SYS_pwrite64, file, bytes, most, at), dies);
}
EXPORT ssize_t pwrite64(int file, const void *bytes, size_t size, off_t at) {
  return pwrite(file, bytes, size, at);
}
EXPORT ssize_t writev(int file, const struct iovec *pieces, int count) {
  int dies;
  size_t size = 0;
  for (int i = 0; i < count; i++) size += pieces[i].iov_len;
  ssize_t most = allowed(file, size, &dies);
  if (most < 0) return most;
  if ((size_t)most == size) return after(syscall(SYS_writev, file, pieces, count), dies);
  size_t first = pieces[0].iov_len < (size_t)most ? pieces[0].iov_len : (size_t)most;
  return after(syscall(SYS_write, file, pieces[0].iov_base, first), dies);
}
EXPORT ssize_t sendfile(int to, int from, off_t *at, size_t size) {
  int dies;
  ssize_t most = allowed(to, size, &dies);
  return most < 0 ? most : after(syscall(SYS_sendfile, to, from, at, most), dies);
}
EXPORT ssize_t sendfile64(int to, int from, off_t *at, size_t size) {
  return sendfile(to, from, at, size);
}
EXPORT ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t size,
                               unsigned flags) {
  int dies;
  ssize_t most = allowed(to, size, &dies);
  if (most < 0) return most;
  return after(syscall(SYS_copy_file_range, from, at, to, there, most, flags), dies);
}
EXPORT size_t fwrite(const void *bytes, size_t size, size_t count, FILE *stream) {
  int dies, file = fileno(stream);
  __typeof__(&fwrite) next = NEXT(fwrite);
  if (state == NULL || file < 0) return next(bytes, size, count, stream);
  ssize_t most = allowed(file, count, &dies);
  if (most < 0) return 0;
  size_t written = next(bytes, size, most, stream);
  if (dies) fflush(stream), die();
  if ((size_t)most < count) errno = ENOSPC;  // the C library itself would have tried again
  return written;
}
EXPORT int ftruncate(int file, off_t size) {
  int fault = fault_on(WRITE, file);
  if (fault != 0 && fault < SHORT) return failed(fault);
  return after(syscall(SYS_ftruncate, file, size), fault == TORN);
}
EXPORT int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }
EXPORT int posix_fallocate(int file, off_t at, off_t size) {
  int fault = fault_on(WRITE, file);
  if (fault != 0 && fault < SHORT) return fault;
  return after(NEXT(posix_fallocate)(file, at, size), fault == TORN);
}
EXPORT int posix_fallocate64(int file, off64_t at, off64_t size) {
  return posix_fallocate(file, at, size);
}

// While a case runs nothing waits for the disk: no machine fails here.
static int synced(int file, int number) {
  int fault = fault_on(FSYNC, file);
  if (fault != 0 && fault < SHORT) return failed(fault);
  return state != NULL ? 0 : syscall(number, file);
}
EXPORT int fsync(int file) { return synced(file, SYS_fsync); }
EXPORT int fdatasync(int file) { return synced(file, SYS_fdatasync); }

EXPORT int renameat2(int from, const char *old, int to, const char *path, unsigned flags) {
  int fault = fault_at(RENAME, to, path);
  if (fault != 0 && fault < SHORT) return failed(fault);
  return syscall(SYS_renameat2, from, old, to, path, flags);
}
EXPORT int renameat(int from, const char *old, int to, const char *path) {
  return renameat2(from, old, to, path, 0);
}
EXPORT int rename(const char *old, const char *path) {
  return renameat(AT_FDCWD, old, AT_FDCWD, path);
}
EXPORT int linkat(int from, const char *old, int to, const char *path, int flags) {
  int fault = fault_at(RENAME, to, path);
  if (fault != 0 && fault < SHORT) return failed(fault);
  return syscall(SYS_linkat, from, old, to, path, flags);
}
EXPORT int link(const char *old, const char *path) {
  return linkat(AT_FDCWD, old, AT_FDCWD, path, 0);
}

EXPORT int mkdirat(int directory, const char *path, mode_t mode) {
  int fault = fault_at(MKDIR, directory, path);
  if (fault != 0 && fault < SHORT) return failed(fault);
  return syscall(SYS_mkdirat, directory, path, mode);
}
EXPORT int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

EXPORT int unlinkat(int directory, const char *path, int flags) {
  int fault = fault_at(REMOVE, directory, path);
  if (fault != 0 && fault < SHORT) return failed(fault);
  return syscall(SYS_unlinkat, directory, path, flags);
}
EXPORT int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
EXPORT int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

EXPORT void *mmap(void *at, size_t size, int access, int flags, int file, off_t from) {
  int fault = (flags & MAP_ANONYMOUS) ? 0 : fault_on(MMAP, file);
  if (fault != 0 && fault < SHORT) {
    errno = fault;
    return MAP_FAILED;
  }
  return (void *)syscall(SYS_mmap, at, size, access, flags, file, from);
}
EXPORT void *mmap64(void *at, size_t size, int access, int flags, int file, off64_t from) {
  return mmap(at, size, access, flags, file, from);
}
