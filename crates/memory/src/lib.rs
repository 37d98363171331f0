//! The address space of a live process: mappings, pages, ptrace, userfaultfd.
//!
//! Everything the platform does to the memory of a running sandbox goes through this crate: it
//! says what is mapped and which pages hold content of the process's own, reads and writes
//! them, stops the process, makes it run system calls, drops its pages and puts them back. It
//! knows processes by number and nothing of sandboxes, functions or patches.
//!
//! # The way out and the way back
//!
//! | step | by |
//! | --- | --- |
//! | freeze the group, stop every thread, thaw under them | [`session::Session::open`] |
//! | mappings, and what stands in the way | [`mappings::Mappings`], [`obstacle::find_obstacles`] |
//! | private pages, and their content | [`pages::PageScanner`], [`reader::read_pages`] |
//! | a userfaultfd of the process | [`session::Session::userfault`] |
//! | register, then drop | [`session::Session::evict`] |
//! | freeze, let go | [`session::Session::close`] |
//! | put anonymous pages back | [`userfault::UserFault::copy`] |
//! | put pages of private file mappings back | [`writer::write_pages`] |
//!
//! Linux 5.15 or later on x86_64; [`features::KernelFeatures`] says what a host lacks.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("medes-memory supports Linux on x86_64; another architecture needs its arch module");

#[path = "arch_x86_64.rs"]
mod arch;
pub mod descriptor;
pub mod drop;
pub mod features;
pub mod guard;
pub mod leave;
pub mod mappings;
pub mod obstacle;
pub mod pages;
pub mod priority;
pub mod ranges;
pub mod reader;
pub mod session;
mod sys;
pub mod tracee;
pub mod userfault;
pub mod writer;

pub use sys::PAGE_SIZE;
