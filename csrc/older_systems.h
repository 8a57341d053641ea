// Ahead of every source of a build for wheels (STELLA_KERNELS_OLDER_SYSTEMS): the versions that glibc has had from the
// start, of functions that got newer ones after 2.28. auditwheel refuses a wheel that asks for another new one.
#pragma once

#if defined(__x86_64__)
#define STELLA_FIRST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define STELLA_FIRST "GLIBC_2.17"
#else
#error "STELLA_KERNELS_OLDER_SYSTEMS: wanted x86-64 or 64-bit ARM; turn it off for another processor."
#endif

#define STELLA_OLD(name) __asm__(".symver " #name "," #name "@" STELLA_FIRST)
STELLA_OLD(pow);
STELLA_OLD(dlopen);
STELLA_OLD(dlsym);
STELLA_OLD(pthread_rwlock_rdlock);
STELLA_OLD(pthread_rwlock_wrlock);
STELLA_OLD(pthread_rwlock_unlock);
#undef STELLA_OLD
#undef STELLA_FIRST
