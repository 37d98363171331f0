//! Sandboxes: namespaces, mounts, cgroups, seccomp, limits.
