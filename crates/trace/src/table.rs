//! Comma-separated tables, line by line.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use crate::error::{TraceError, What};

/// No line of a trace is longer; a day of minutes with ten digits each is 16 KiB.
const MAX_LINE: usize = 1 << 20;

/// A table that is being read.
pub(crate) struct Table {
    path: PathBuf,
    input: BufReader<File>,
    line: u64,
    buffer: Vec<u8>,
    pub(crate) header: Vec<String>,
}

/// One line of a table.
pub(crate) struct Row<'a> {
    path: &'a Path,
    line: u64,
    text: &'a str,
    /// Start and end of each field.
    fields: Vec<(u32, u32)>,
}

impl Table {
    /// Opens a table and reads its header.
    pub(crate) fn open(path: &Path) -> Result<Self, TraceError> {
        let file = File::open(path).map_err(TraceError::io(path))?;
        let mut table = Self {
            path: path.to_owned(),
            input: BufReader::with_capacity(1 << 16, file),
            line: 0,
            buffer: Vec::new(),
            header: Vec::new(),
        };
        let header = match table.next()? {
            Some(row) => row.fields().map(|f| f.trim().to_owned()).collect(),
            None => Vec::new(),
        };
        table.header = header;
        Ok(table)
    }

    /// The position of a column, if there is one of that name.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|h| h == name)
    }

    /// The position of a column that has to be there.
    pub(crate) fn column(&self, name: &str) -> Result<usize, TraceError> {
        self.find(name).ok_or_else(|| self.header_error(0, What::NoColumn(name.to_owned())))
    }

    pub(crate) fn header_error(&self, column: usize, what: What) -> TraceError {
        TraceError::Bad { path: self.path.clone(), line: 1, column, what: Box::new(what) }
    }

    /// The next line that is not empty; its fields are as many as the header's.
    pub(crate) fn next(&mut self) -> Result<Option<Row<'_>>, TraceError> {
        loop {
            self.buffer.clear();
            self.line += 1;
            let bad = |line, what| TraceError::Bad {
                path: self.path.clone(),
                line,
                column: 0,
                what: Box::new(what),
            };
            if !read_line(&mut self.input, &mut self.buffer).map_err(TraceError::io(&self.path))? {
                return Ok(None);
            }
            if self.buffer.len() > MAX_LINE {
                return Err(bad(self.line, What::TooLong(MAX_LINE)));
            }
            let start =
                if self.line == 1 && self.buffer.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
            if self.buffer[start..].is_empty() {
                continue;
            }
            let Ok(text) = std::str::from_utf8(&self.buffer[start..]) else {
                return Err(bad(self.line, What::NotText));
            };
            let Some(fields) = split(text) else {
                return Err(bad(self.line, What::OpenQuote));
            };
            if self.line > 1 && !self.header.is_empty() && fields.len() != self.header.len() {
                let what = What::Width { expected: self.header.len(), found: fields.len() };
                return Err(bad(self.line, what));
            }
            // Borrowed again, for the loop would hold the first borrow.
            let text = std::str::from_utf8(&self.buffer[start..]).unwrap_or_default();
            return Ok(Some(Row { path: &self.path, line: self.line, text, fields }));
        }
    }
}

/// Reads a line without its end, never much more than [`MAX_LINE`]; false at the end of the file.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut any = false;
    loop {
        let available = input.fill_buf()?;
        if available.is_empty() {
            return Ok(any);
        }
        any = true;
        let (part, used, done) = match available.iter().position(|b| *b == b'\n') {
            Some(end) => (&available[..end], end + 1, true),
            None => (available, available.len(), line.len() > MAX_LINE),
        };
        line.extend_from_slice(part);
        input.consume(used);
        if done {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            return Ok(true);
        }
    }
}

/// Where the fields are. Quotation marks round a field are taken off; a comma inside them does not
/// separate. `None` if one is not closed.
fn split(text: &str) -> Option<Vec<(u32, u32)>> {
    let bytes = text.as_bytes();
    let mut fields = Vec::new();
    let mut at = 0;
    loop {
        if bytes.get(at) == Some(&b'"') {
            let end = at + 1 + bytes[at + 1..].iter().position(|b| *b == b'"')?;
            fields.push((at as u32 + 1, end as u32));
            at = end + 1;
        } else {
            let end = bytes[at..].iter().position(|b| *b == b',').map_or(bytes.len(), |n| at + n);
            fields.push((at as u32, end as u32));
            at = end;
        }
        match bytes.get(at) {
            Some(b',') => at += 1,
            Some(_) => return None,
            None => return Some(fields),
        }
    }
}

impl Row<'_> {
    pub(crate) fn fields(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().map(|(a, b)| &self.text[*a as usize..*b as usize])
    }

    pub(crate) fn get(&self, column: usize) -> &str {
        self.fields.get(column).map_or("", |(a, b)| &self.text[*a as usize..*b as usize])
    }

    pub(crate) fn error(&self, column: usize, what: What) -> TraceError {
        TraceError::Bad {
            path: self.path.to_owned(),
            line: self.line,
            column: column + 1,
            what: Box::new(what),
        }
    }

    /// A name, never empty.
    pub(crate) fn name(&self, column: usize, what: &'static str) -> Result<&str, TraceError> {
        match self.get(column).trim() {
            "" => Err(self.error(column, What::NoName(what))),
            name => Ok(name),
        }
    }

    /// A number within bounds.
    pub(crate) fn number(
        &self,
        column: usize,
        name: &'static str,
        least: f64,
        most: f64,
    ) -> Result<f64, TraceError> {
        let text: Cow<'_, str> = self.get(column).trim().into();
        let value: f64 = text
            .parse()
            .map_err(|_| self.error(column, What::NotANumber(text.chars().take(80).collect())))?;
        if (least..=most).contains(&value) {
            return Ok(value);
        }
        let what = What::Range {
            name,
            value: text.chars().take(80).collect(),
            least: least.to_string(),
            most: most.to_string(),
        };
        Err(self.error(column, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_separated_by_commas_outside_quotes() {
        let fields = |t: &'static str| {
            split(t)
                .map(|f| f.iter().map(|(a, b)| &t[*a as usize..*b as usize]).collect::<Vec<_>>())
        };
        assert_eq!(fields("a,b,,c"), Some(vec!["a", "b", "", "c"]));
        assert_eq!(fields("\"a,b\",c"), Some(vec!["a,b", "c"]));
        assert_eq!(fields("x,"), Some(vec!["x", ""]));
        assert_eq!(fields("\"a"), None);
        assert_eq!(fields("\"a\"b"), None);
    }
}
