//! The page as a whole.

use medes_simulator::Run;

use crate::sections;
use crate::svg::escape;

/// What stands above the results.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Heading {
    /// The page's title.
    pub title: String,
    /// When, where and by which command it was made: a line each.
    pub origin: Vec<String>,
}

/// The page for some runs.
#[must_use]
pub fn page(heading: &Heading, runs: &[Run]) -> String {
    let mut out = String::with_capacity(1 << 20);
    out.push_str("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    out.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">");
    out.push_str("<meta name=\"color-scheme\" content=\"light dark\"><title>");
    out.push_str(&escape(&heading.title));
    out.push_str("</title><style>");
    out.push_str(include_str!("page.css"));
    out.push_str("</style></head><body><main><header><h1>");
    out.push_str(&escape(&heading.title));
    out.push_str("</h1>");
    out.push_str(&sections::subtitle(runs));
    out.push_str("</header>");
    for section in sections::all(runs) {
        out.push_str(&section);
    }
    out.push_str("<footer>");
    for line in &heading.origin {
        out.push_str("<p>");
        out.push_str(&escape(line));
        out.push_str("</p>");
    }
    out.push_str("</footer></main></body></html>\n");
    out
}
