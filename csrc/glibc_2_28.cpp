// Part of the library when it is linked for glibc 2.28 (MG_OPS_MANYLINUX in CMakeLists.txt) where glibc is newer.
//
// The standard library of a machine with glibc 2.32 or newer compiles a look at this variable, which older ones do not
// have, into std::shared_ptr, and skips atomic instructions where it is true. This is the library's own copy, which no
// other sees, and says that there may be other threads: always right.
extern "C" {
char __libc_single_threaded = 0;
}
