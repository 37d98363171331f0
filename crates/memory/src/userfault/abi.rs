//! Numbers and structures of linux/userfaultfd.h.

/// `_IO(0xAA, 0)` on `/dev/userfaultfd` (6.1).
pub const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
pub const UFFD_API: u64 = 0xaa;
pub const UFFDIO_API: u64 = 0xc018_aa3f;
pub const UFFDIO_REGISTER: u64 = 0xc020_aa00;
pub const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
pub const UFFDIO_WAKE: u64 = 0x8010_aa02;
pub const UFFDIO_COPY: u64 = 0xc028_aa03;
pub const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
pub const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;

pub const REGISTER_MODE_MISSING: u64 = 1 << 0;
pub const REGISTER_MODE_WP: u64 = 1 << 1;
pub const COPY_MODE_DONTWAKE: u64 = 1 << 0;
pub const COPY_MODE_WP: u64 = 1 << 1;
pub const ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
pub const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

pub const EVENT_PAGEFAULT: u8 = 0x12;
pub const EVENT_FORK: u8 = 0x13;
pub const EVENT_REMAP: u8 = 0x14;
pub const EVENT_REMOVE: u8 = 0x15;
pub const EVENT_UNMAP: u8 = 0x16;

pub const PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub const PAGEFAULT_FLAG_WP: u64 = 1 << 1;

#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct Api {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct Range {
    pub start: u64,
    pub len: u64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct Register {
    pub range: Range,
    pub mode: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct Copy {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub copy: i64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct ZeroPage {
    pub range: Range,
    pub mode: u64,
    pub zeropage: i64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct WriteProtect {
    pub range: Range,
    pub mode: u64,
}

/// `struct uffd_msg`; the union as three words.
#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct Message {
    pub event: u8,
    pub reserved1: u8,
    pub reserved2: u16,
    pub reserved3: u32,
    pub args: [u64; 3],
}

const _: () = assert!(size_of::<Message>() == 32);
