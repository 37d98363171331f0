//! The address space of a live process: mappings, pages, ptrace, userfaultfd.
