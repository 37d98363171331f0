//! The end of one request's log, as `LogType=Tail` asks for it.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use medes_controller::Deployed;
use medes_core::{InvocationResult, StartKind};
use medes_node::NodeApi;

/// As much as Lambda gives, bytes.
const LENGTH: usize = 4096;
/// How long what the function wrote last may take to reach the log.
const LAG: Duration = Duration::from_millis(20);

/// The place in a function's log where a request began.
pub(super) struct LogTail {
    deployed: Arc<Deployed>,
    position: u64,
}

impl LogTail {
    pub(super) async fn begin(node: &impl NodeApi, deployed: Arc<Deployed>) -> Self {
        let (_, position) = node.logs_tail(&deployed.spec, 0).await;
        Self { deployed, position }
    }

    /// What the request's sandbox has written since, between the lines that Lambda adds.
    pub(super) async fn end(self, node: &impl NodeApi, result: &InvocationResult) -> String {
        // The log is written by another process, which reads the function's output from a pipe.
        tokio::time::sleep(LAG).await;
        let (text, _) = node.logs_after(&self.deployed.spec, self.position).await;
        let sandbox = result.sandbox.map(|s| s.to_string()).unwrap_or_default();
        let memory = result
            .sandbox
            .and_then(|s| node.memory_of(s))
            .map_or(0, |m| m.total().div_ceil(1 << 20));
        let whole = compose(&own_lines(&text, &sandbox), result, &self.deployed, memory);
        cut(&whole).to_owned()
    }
}

/// The lines of one sandbox, without the time and the sandbox that each begins with. A sandbox
/// serves one request at a time, so they are this request's.
fn own_lines(text: &str, sandbox: &str) -> String {
    let mut lines = String::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ' ');
        let (_, owner, rest) = (parts.next(), parts.next(), parts.next());
        if owner.is_some_and(|o| o.len() >= 8 && sandbox.starts_with(o)) {
            lines.push_str(rest.unwrap_or(""));
            lines.push('\n');
        }
    }
    lines
}

fn compose(lines: &str, result: &InvocationResult, deployed: &Deployed, memory_mib: u64) -> String {
    let request = result.request;
    let ms = |us: u64| us as f64 / 1000.0;
    let duration = ms(result.timing.execution_us);
    let mut text = format!(
        "START RequestId: {request} Version: $LATEST\n{lines}END RequestId: {request}\n\
         REPORT RequestId: {request}\tDuration: {duration:.2} ms\tBilled Duration: {} ms\t\
         Memory Size: {} MB\tMax Memory Used: {memory_mib} MB\t",
        duration.ceil(),
        deployed.spec.memory_mib
    );
    if result.start == StartKind::Cold {
        let _ = write!(text, "Init Duration: {:.2} ms\t", ms(result.timing.startup_us));
    }
    text.push('\n');
    text
}

/// The end of a text, beginning with a whole character.
fn cut(text: &str) -> &str {
    let mut from = text.len().saturating_sub(LENGTH);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sandboxs_own_lines_are_shown() {
        let text = "2026-01-01T00:00:00.000Z 00000000 hello world\n\
                    2026-01-01T00:00:00.000Z 11111111 other\n\
                    2026-01-01T00:00:00.000Z 00000000 \nodd\n";
        assert_eq!(own_lines(text, "00000000aaaaaaaa"), "hello world\n\n");
        assert_eq!(own_lines(text, ""), "");
    }

    #[test]
    fn the_end_is_kept_and_no_character_is_cut() {
        let text = "ä".repeat(LENGTH);
        assert_eq!(cut(&text).len(), LENGTH);
        let odd = format!("{text}x");
        assert!(cut(&odd).len() < LENGTH && cut(&odd).ends_with('x'));
        assert_eq!(cut("short"), "short");
    }
}
