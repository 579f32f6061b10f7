/* A slow disk and a clock that jumps, for a process that loads this before libc (LD_PRELOAD).

   SLOW_FOLDER, SLOW_MS: below that folder fsync, fdatasync and rename take so long.
   CLOCK_OFFSET: a file of 8 bytes: what is added to the wall clock, in nanoseconds; whoever writes
   to it moves the clock. The monotonic clock stays. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const char *slow_folder;
static long slow_ms;
static volatile int64_t *offset;

__attribute__((constructor)) static void begin(void) {
    slow_folder = getenv("SLOW_FOLDER");
    slow_ms = getenv("SLOW_MS") ? atol(getenv("SLOW_MS")) : 0;
    const char *path = getenv("CLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) offset = page;
    close(file);
}

static void dawdle(const char *path) {
    if (!slow_folder || strncmp(path, slow_folder, strlen(slow_folder))) return;
    struct timespec pause = {slow_ms / 1000, slow_ms % 1000 * 1000000};
    nanosleep(&pause, NULL);
}

static void dawdle_at(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    dawdle(path);
}

int fsync(int file) {
    dawdle_at(file);
    return (int)syscall(SYS_fsync, file);
}

int fdatasync(int file) {
    dawdle_at(file);
    return (int)syscall(SYS_fdatasync, file);
}

int rename(const char *from, const char *to) {
    dawdle(to);
    return (int)syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
}

int clock_gettime(clockid_t clock, struct timespec *found) {
    static int (*libc)(clockid_t, struct timespec *);
    if (!libc) libc = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = libc(clock, found);
    if (!failed && offset && clock == CLOCK_REALTIME) {
        int64_t now = found->tv_sec * INT64_C(1000000000) + found->tv_nsec + *offset;
        found->tv_sec = now / INT64_C(1000000000);
        found->tv_nsec = now % INT64_C(1000000000);
    }
    return failed;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
    (void)zone;
    struct timespec now;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
