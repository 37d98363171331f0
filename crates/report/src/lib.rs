//! One page that shows what simulations and replays found.
//!
//! Results go in, HTML text comes out: a single page with its style and drawings in it, which needs
//! no network and no script, follows the reader's light or dark setting and can be printed. What
//! there are no results for is left out.

#![forbid(unsafe_code)]

mod chart;
mod page;
mod paper;
mod scale;
mod sections;
mod svg;

pub use page::{Heading, page};
