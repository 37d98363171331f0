//! The measurement against a platform that only plays one: the same API, no sandboxes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use medes_bench::examples::{Case, Manifest};
use medes_core::SandboxId;
use serde_json::{Value, json};

use super::measure::{Cases, Measurement, Plan};
use super::report::FunctionReport;
use crate::client::Client;
use crate::progress::View;

/// What the platform does wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// A sandbox that was restored answers wrongly.
    WrongAfterDedup,
    /// A second sandbox is never made.
    OneSandbox,
}

#[derive(Clone)]
struct Sandbox {
    id: SandboxId,
    state: &'static str,
    restored: bool,
    /// Listings since its last request; this platform's clock, so that a slow machine changes
    /// nothing.
    listings: u32,
}

struct Player {
    flaw: Flaw,
    sandboxes: Mutex<Vec<Sandbox>>,
}

impl Player {
    fn start(flaw: Flaw) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let player = Arc::new(Self { flaw, sandboxes: Mutex::new(Vec::new()) });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let player = player.clone();
                std::thread::spawn(move || player.serve(&stream));
            }
        });
        url
    }

    fn serve(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while reader.read_line(&mut line).unwrap_or(0) > 0 {
            let mut length = 0;
            loop {
                let mut header = String::new();
                reader.read_line(&mut header).unwrap();
                if let Some(n) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
                if header.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let path = line.split(' ').nth(1).unwrap().to_owned();
            let (start, answer) = self.answer(&path, &body);
            let text = answer.to_string();
            let _ = (&mut &*stream).write_all(
                format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nx-medes-start: {start}\r\n\r\n{text}",
                    text.len()
                )
                .as_bytes(),
            );
            line.clear();
        }
    }

    fn answer(&self, path: &str, body: &[u8]) -> (&'static str, Value) {
        match path {
            "/v1/functions/f/invoke" => self.invoke(body),
            "/v1/functions/f/purge" => {
                self.sandboxes.lock().unwrap().clear();
                ("", json!({"results": []}))
            }
            "/v1/functions/f/dedup" => {
                self.sandboxes.lock().unwrap().iter_mut().for_each(|s| s.state = "dedup");
                ("", json!({"results": []}))
            }
            "/v1/info" => {
                let base = if self.sandboxes.lock().unwrap().is_empty() { 0 } else { 8_000_000 };
                ("", json!({"version": "0", "node": {"memory": {"base": base}}}))
            }
            _ => ("", self.list()),
        }
    }

    fn list(&self) -> Value {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        for s in sandboxes.iter_mut() {
            s.listings += 1;
            if s.state == "warm" && s.listings > 2 {
                s.state = "dedup";
            }
        }
        let list: Vec<_> = sandboxes
            .iter()
            .map(|s| {
                let bytes = if s.state == "dedup" { 1_000_000 } else { 20_000_000 };
                json!({"id": s.id.to_string(), "function": "f", "state": s.state,
                       "memory_total": bytes, "warm_bytes": 20_000_000})
            })
            .collect();
        json!({ "sandboxes": list })
    }

    fn invoke(&self, body: &[u8]) -> (&'static str, Value) {
        let (id, start, restored) = loop {
            if let Some(found) = self.take() {
                break found;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        std::thread::sleep(Duration::from_millis(5));
        if let Some(s) = self.sandboxes.lock().unwrap().iter_mut().find(|s| s.id == id) {
            s.state = "warm";
            s.listings = 0;
        }
        let event: Value = serde_json::from_slice(body).unwrap();
        let wrong = self.flaw == Flaw::WrongAfterDedup && restored;
        (start, json!({ "seed": if wrong { json!(0) } else { event["seed"].clone() } }))
    }

    /// A sandbox for a request: warm, else dedup, else new.
    fn take(&self) -> Option<(SandboxId, &'static str, bool)> {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        for (state, start) in [("warm", "warm"), ("dedup", "dedup")] {
            if let Some(s) = sandboxes.iter_mut().find(|s| s.state == state) {
                s.state = "running";
                s.restored |= state == "dedup";
                return Some((s.id, start, s.restored));
            }
        }
        if self.flaw == Flaw::OneSandbox && !sandboxes.is_empty() {
            return None;
        }
        let id = SandboxId::random();
        sandboxes.push(Sandbox { id, state: "running", restored: false, listings: 0 });
        Some((id, "cold", false))
    }
}

fn measure(flaw: Flaw) -> FunctionReport {
    let manifest: Manifest = toml::from_str(
        "[[function]]\nname = \"f\"\nhandler = \"h\"\nlayers = []\nmemory_mib = 1\ntimeout_s = 1\n\
         events = [{ seed = 1 }, { seed = 2, size = 3 }]\n",
    )
    .unwrap();
    let example = &manifest.choose(&["f".to_owned()], false).unwrap()[0];
    let plan = Plan { sandboxes: 3, cycles: 4, idle: Duration::ZERO };
    let case = |event: Value| Case {
        expected: json!({ "seed": event["seed"] }),
        payload: event.to_string().into_bytes(),
    };
    let cases = Cases {
        plain: example.plain_events(plan.singles()).into_iter().map(case).collect(),
        mixed: example.mixed_events(plan.concurrent()).into_iter().map(case).collect(),
    };
    let client = Client::new(&Player::start(flaw)).unwrap();
    let mut line = View::new().line("f", 1);
    Measurement::new(&client, example, &cases, plan, &mut line, &|| false).run()
}

#[test]
fn every_kind_of_start_is_measured_and_every_answer_checked() {
    let report = measure(Flaw::None);
    assert_eq!(report.checked.problem, None);
    assert!(report.missing().is_empty());
    assert_eq!(report.cold_ms.unwrap().samples, 5);
    assert_eq!(report.warm_ms.unwrap().samples, 12);
    assert_eq!(report.dedup_ms.unwrap().samples, 4);
    let starts = report.starts;
    assert_eq!(starts.cold + starts.warm + starts.dedup, report.checked.answers_checked);
    assert!(report.checked.answers_checked >= 5 + 12 + 4 + (1 + 3 + 4) * 3);
    assert_eq!(report.checked.answers_wrong, 0);
    assert_eq!((report.warm_bytes, report.dedup_bytes), (20_000_000, 1_000_000));
    assert_eq!(report.base_bytes, 8_000_000);
}

#[test]
fn a_wrong_answer_is_counted_and_shown() {
    let report = measure(Flaw::WrongAfterDedup);
    assert!(report.checked.answers_wrong >= 4, "{}", report.checked.answers_wrong);
    let problem = report.checked.problem.unwrap();
    assert!(problem.contains("(dedup start)") && problem.contains("instead of"), "{problem}");
}

#[test]
fn a_platform_that_does_not_scale_out_is_a_problem() {
    let problem = measure(Flaw::OneSandbox).checked.problem.unwrap();
    assert!(problem.contains("3 requests at once were served by 1 sandboxes"), "{problem}");
}
