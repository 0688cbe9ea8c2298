/* Counts the calls that change durable state under one directory, and kills its process at one.

   Loaded with LD_PRELOAD. The environment says what to do, and is cleaned of it at once so that
   child processes are left alone:

     SECAGG_CRASH_ROOT  absolute path without symlinks; calls on anything else pass untouched
     SECAGG_CRASH_LOG   a file outside the root: one line "index op path size nanoseconds" a call,
                        written before the call is made; path relative to the root, the clock is
                        CLOCK_MONOTONIC
     SECAGG_CRASH_AT    "before:17", "after:17": SIGKILL to itself right before or after call 17;
                        "torn:17": a write puts down its first half and then dies

   Numbers are global over all threads. SQLite's -shm file is ignored: it is memory that happens to
   have a name, and is rebuilt after a crash. Calls go to the kernel directly rather than to the
   next definition, so nothing in here can recurse or depend on the order of initialisation. What
   libc does inside itself (stdio's writes) cannot be seen from here; a test compares with strace. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum side { NEVER, BEFORE, AFTER, TORN };

static char root[PATH_MAX];
static size_t root_length;
static int log_file = -1;
static enum side side = NEVER;
static unsigned long target;
static atomic_ulong counter;

__attribute__((constructor)) static void prepare(void)
{
    const char *where = getenv("SECAGG_CRASH_ROOT");
    const char *log = getenv("SECAGG_CRASH_LOG");
    const char *at = getenv("SECAGG_CRASH_AT");
    if (where == NULL || strlen(where) >= sizeof root)
        return;
    if (log != NULL)
        log_file = (int)syscall(SYS_openat, AT_FDCWD, log,
                                O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (at != NULL) {
        const char *number = strchr(at, ':');
        side = *at == 'b' ? BEFORE : *at == 'a' ? AFTER : TORN;
        target = number == NULL ? 0 : strtoul(number + 1, NULL, 10);
    }
    strcpy(root, where);
    root_length = strlen(root);
    unsetenv("SECAGG_CRASH_ROOT");
    unsetenv("SECAGG_CRASH_LOG");
    unsetenv("SECAGG_CRASH_AT");
    unsetenv("LD_PRELOAD");
}

static void die(void)
{
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

/* What a descriptor stands for, without the kernel's note that its name is gone. */
static int path_of_file(int file, char *path)
{
    static const char gone[] = " (deleted)";
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (size <= 0)
        return 0;
    path[size] = 0;
    size_t tail = sizeof gone - 1;
    if ((size_t)size > tail && strcmp(path + size - tail, gone) == 0)
        path[size - tail] = 0;
    return 1;
}

static int path_of_name(int directory, const char *name, char *path)
{
    if (name == NULL)
        return 0;
    if (*name == '/') {
        if (strlen(name) >= PATH_MAX)
            return 0;
        strcpy(path, name);
        return 1;
    }
    if (directory == AT_FDCWD) {
        if (syscall(SYS_getcwd, path, PATH_MAX) <= 0)
            return 0;
    } else if (!path_of_file(directory, path)) {
        return 0;
    }
    size_t length = strlen(path);
    if (length + strlen(name) + 2 > PATH_MAX)
        return 0;
    path[length] = '/';
    strcpy(path + length + 1, name);
    return 1;
}

/* The part of a path below the root; NULL for what is not ours. */
static const char *below(const char *path)
{
    if (strncmp(path, root, root_length) != 0)
        return NULL;
    const char *rest = path + root_length;
    if (*rest == 0)
        return ".";
    if (*rest != '/')
        return NULL;
    size_t length = strlen(rest);
    if (length >= 4 && strcmp(rest + length - 4, "-shm") == 0)
        return NULL;
    return rest + 1;
}

/* Count a call; returns its number. Dies here if it is the one to die before. */
static unsigned long count(const char *op, const char *path, size_t size)
{
    unsigned long index = atomic_fetch_add(&counter, 1) + 1;
    if (log_file >= 0) {
        char line[PATH_MAX + 128];
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        int length = snprintf(line, sizeof line, "%lu %s %s %zu %lld\n", index, op, path, size,
                              now.tv_sec * 1000000000LL + now.tv_nsec);
        syscall(SYS_write, log_file, line, (size_t)length);
    }
    if (index == target && side == BEFORE)
        die();
    return index;
}

static unsigned long count_file(const char *op, int file, size_t size)
{
    char path[PATH_MAX];
    if (root_length == 0 || file == log_file || !path_of_file(file, path))
        return 0;
    const char *name = below(path);
    return name == NULL ? 0 : count(op, name, size);
}

static unsigned long count_name(const char *op, int directory, const char *name)
{
    char path[PATH_MAX];
    if (root_length == 0 || !path_of_name(directory, name, path))
        return 0;
    const char *rest = below(path);
    return rest == NULL ? 0 : count(op, rest, 0);
}

static int dies_at(unsigned long index, enum side where)
{
    return index != 0 && index == target && side == where;
}

/* After the call: die if this is its number. A torn call that cannot tear dies here, too. */
static long done(unsigned long index, long result)
{
    if (dies_at(index, AFTER) || dies_at(index, TORN)) {
        int error = errno;
        die();
        errno = error;
    }
    return result;
}

/* Writes. */

static long put(const char *op, int file, const void *data, size_t size, long long offset)
{
    int error = errno;
    unsigned long index = count_file(op, file, size);
    errno = error;
    if (dies_at(index, TORN))
        size /= 2;
    long result = offset < 0 ? syscall(SYS_write, file, data, size)
                             : syscall(SYS_pwrite64, file, data, size, offset);
    return done(index, result);
}

ssize_t write(int file, const void *data, size_t size)
{
    return put("write", file, data, size, -1);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset)
{
    return put("pwrite", file, data, size, offset);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset)
{
    return put("pwrite", file, data, size, offset);
}

static size_t total(const struct iovec *parts, int number)
{
    size_t sum = 0;
    for (int i = 0; i < number; i++)
        sum += parts[i].iov_len;
    return sum;
}

ssize_t writev(int file, const struct iovec *parts, int number)
{
    unsigned long index = count_file("writev", file, total(parts, number));
    return done(index, syscall(SYS_writev, file, parts, number));
}

ssize_t pwritev(int file, const struct iovec *parts, int number, off_t offset)
{
    unsigned long index = count_file("pwritev", file, total(parts, number));
    return done(index, syscall(SYS_pwritev, file, parts, number, offset, 0L));
}

ssize_t pwritev64(int file, const struct iovec *parts, int number, off64_t offset)
{
    return pwritev(file, parts, number, offset);
}

/* Sizes and syncs. */

int fsync(int file)
{
    unsigned long index = count_file("fsync", file, 0);
    return (int)done(index, syscall(SYS_fsync, file));
}

int fdatasync(int file)
{
    unsigned long index = count_file("fdatasync", file, 0);
    return (int)done(index, syscall(SYS_fdatasync, file));
}

int sync_file_range(int file, off64_t offset, off64_t size, unsigned int flags)
{
    unsigned long index = count_file("sync_file_range", file, (size_t)size);
    return (int)done(index, syscall(SYS_sync_file_range, file, offset, size, flags));
}

int ftruncate(int file, off_t size)
{
    unsigned long index = count_file("ftruncate", file, (size_t)size);
    return (int)done(index, syscall(SYS_ftruncate, file, size));
}

int ftruncate64(int file, off64_t size)
{
    return ftruncate(file, size);
}

int posix_fallocate(int file, off_t offset, off_t size)
{
    unsigned long index = count_file("fallocate", file, (size_t)size);
    int error = errno;
    long result = done(index, syscall(SYS_fallocate, file, 0, offset, size));
    int found = result < 0 ? errno : 0; /* posix_fallocate returns it */
    errno = error;
    return found;
}

int posix_fallocate64(int file, off64_t offset, off64_t size)
{
    return posix_fallocate(file, offset, size);
}

int fallocate(int file, int mode, off_t offset, off_t size)
{
    unsigned long index = count_file("fallocate", file, (size_t)size);
    return (int)done(index, syscall(SYS_fallocate, file, mode, offset, size));
}

int fallocate64(int file, int mode, off64_t offset, off64_t size)
{
    return fallocate(file, mode, offset, size);
}

/* Names. A rename counts under its new name. */

static int move(int from, const char *old, int to, const char *new, unsigned int flags)
{
    unsigned long index = count_name("rename", to, new);
    return (int)done(index, syscall(SYS_renameat2, from, old, to, new, flags));
}

int rename(const char *old, const char *new)
{
    return move(AT_FDCWD, old, AT_FDCWD, new, 0);
}

int renameat(int from, const char *old, int to, const char *new)
{
    return move(from, old, to, new, 0);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned int flags)
{
    return move(from, old, to, new, flags);
}

int unlinkat(int directory, const char *name, int flags)
{
    unsigned long index = count_name(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, name);
    return (int)done(index, syscall(SYS_unlinkat, directory, name, flags));
}

int unlink(const char *name)
{
    return unlinkat(AT_FDCWD, name, 0);
}

int rmdir(const char *name)
{
    return unlinkat(AT_FDCWD, name, AT_REMOVEDIR);
}

int mkdirat(int directory, const char *name, mode_t mode)
{
    unsigned long index = count_name("mkdir", directory, name);
    return (int)done(index, syscall(SYS_mkdirat, directory, name, mode));
}

int mkdir(const char *name, mode_t mode)
{
    return mkdirat(AT_FDCWD, name, mode);
}

static int create(int directory, const char *name, int flags, mode_t mode)
{
    unsigned long index = 0;
    if (flags & (O_CREAT | O_TRUNC))
        index = count_name("open", directory, name);
    return (int)done(index, syscall(SYS_openat, directory, name, flags, mode));
}

static int has_mode(int flags)
{
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;
}

#define MODE_OF(flags, mode)             \
    mode_t mode = 0;                     \
    if (has_mode(flags)) {               \
        va_list rest;                    \
        va_start(rest, flags);           \
        mode = va_arg(rest, mode_t);     \
        va_end(rest);                    \
    }

int open(const char *name, int flags, ...)
{
    MODE_OF(flags, mode)
    return create(AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...)
{
    MODE_OF(flags, mode)
    return create(AT_FDCWD, name, flags, mode);
}

int openat(int directory, const char *name, int flags, ...)
{
    MODE_OF(flags, mode)
    return create(directory, name, flags, mode);
}

int openat64(int directory, const char *name, int flags, ...)
{
    MODE_OF(flags, mode)
    return create(directory, name, flags, mode);
}

int creat(const char *name, mode_t mode)
{
    return create(AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, mode);
}
