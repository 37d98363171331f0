//! What commands print: tables for people, JSON for programs.

use std::io::{ErrorKind, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use comfy_table::{CellAlignment, Table};
use serde_json::Value;

/// The flag of every command that has something to print.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Format {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

impl Format {
    /// Prints `value` as JSON, or what `human` makes of it.
    pub fn print(self, value: &Value, human: impl FnOnce() -> String) {
        if self.json {
            print(&format!("{value:#}\n"));
        } else {
            print(&human());
        }
    }
}

/// Writes to standard output. When its reader has gone (`medes ps | head -1`) the process ends,
/// quietly, as filters do.
pub fn print(text: &str) {
    print_bytes(text.as_bytes());
}

/// [`print`] for what need not be text.
pub fn print_bytes(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    if let Err(e) = out.write_all(bytes).and_then(|()| out.flush()) {
        if e.kind() != ErrorKind::BrokenPipe {
            eprintln!("medes: cannot write to standard output: {e}");
            std::process::exit(3);
        }
        std::process::exit(0);
    }
}

/// Whether standard output is a terminal that may be redrawn.
pub fn is_terminal() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// Whether colours are wanted: on a terminal, unless `NO_COLOR` is set (no-color.org).
pub fn colours() -> bool {
    is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A table without lines: columns aligned, a header in capitals. Columns whose header begins
/// with `>` hold numbers and are aligned to the right.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header.iter().map(|h| h.trim_start_matches('>')));
    for row in rows {
        table.add_row(row);
    }
    for (i, h) in header.iter().enumerate() {
        if let Some(column) = table.column_mut(i) {
            column.set_padding((0, 2));
            if h.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    let mut out = String::new();
    for line in table.lines() {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Bytes in millions, as the tables show them: `18.5 MB`.
pub fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A span of time in two significant units at most: `3m 20s`, `45s`, `2d 3h`.
pub fn span(t: Duration) -> String {
    let s = t.as_secs();
    match s {
        0 => "0s".to_owned(),
        1..60 => format!("{s}s"),
        60..3600 => two(s / 60, 'm', s % 60, 's'),
        3600..86_400 => two(s / 3600, 'h', s % 3600 / 60, 'm'),
        _ => two(s / 86_400, 'd', s % 86_400 / 3600, 'h'),
    }
}

fn two(a: u64, unit_a: char, b: u64, unit_b: char) -> String {
    if b == 0 { format!("{a}{unit_a}") } else { format!("{a}{unit_a} {b}{unit_b}") }
}

/// Microseconds as milliseconds: `1.25 ms`.
pub fn milliseconds(us: u64) -> String {
    format!("{:.2} ms", us as f64 / 1000.0)
}

/// A share as percentage: `93 %`.
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Text that may hold control characters made safe for a terminal.
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_have_no_trailing_blanks() {
        let text = table(
            &["NAME", ">COUNT", "NOTE"],
            [
                vec!["a".into(), "1".into(), String::new()],
                vec!["longer".into(), "100".into(), "x".into()],
            ],
        );
        assert_eq!(text, "NAME    COUNT  NOTE\na           1\nlonger    100  x\n");
    }

    #[test]
    fn an_empty_table_is_its_header() {
        assert_eq!(table(&["A", ">B"], []), "A  B\n");
    }

    #[test]
    fn quantities_are_short() {
        assert_eq!(megabytes(18_480_000), "18.5 MB");
        assert_eq!(percent(0.934), "93 %");
        assert_eq!(milliseconds(1_254), "1.25 ms");
        for (s, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (200, "3m 20s"),
            (7265, "2h 1m"),
            (180_000, "2d 2h"),
        ] {
            assert_eq!(span(Duration::from_secs(s)), text);
        }
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\n");
    }
}
