//! Why memory could not be brought back.

use medes_memory::userfault::FillError;
use medes_memory::writer::WriteError;
use medes_pages::DecodeError;

use crate::image::ImageError;

/// The kernel's error number for a process that is gone.
pub(crate) const ESRCH: i32 = 3;

/// Why a restore failed. The sandbox has part of its pages then, and may not run.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image can't be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image refers to a base page that is not where it should be.
    #[error("base page {page} of snapshot {snapshot} is not in the page store")]
    NoBasePage {
        /// The snapshot's index in the image.
        snapshot: u16,
        /// The page.
        page: u32,
    },
    /// A patch does not decode.
    #[error("a patch does not decode: {0}")]
    Patch(#[from] DecodeError),
    /// A patch, or its base page, is not what it was when it was stored.
    #[error("a page decodes to other content than it was made from: the page store is corrupt")]
    Corrupt,
    /// The image has another number of processes than there are userfaultfds.
    #[error("{descriptors} userfaultfds for {processes} processes")]
    Descriptors {
        /// How many userfaultfds were given.
        descriptors: usize,
        /// How many processes the image has.
        processes: usize,
    },
    /// The kernel did not take a page.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// The kernel did not take a page of a private file mapping.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The userfaultfd can't be read.
    #[error("reading what the process does: {0}")]
    Events(std::io::Error),
    /// The userfaultfd could not be released.
    #[error("releasing the userfaultfd: {0}")]
    Release(std::io::Error),
}

impl RestoreError {
    /// Whether it only says that the process has ended.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Fill(FillError::Gone) | Self::Write(WriteError::Gone(_)) => true,
            Self::Release(error) | Self::Events(error) => error.raw_os_error() == Some(ESRCH),
            _ => false,
        }
    }
}
