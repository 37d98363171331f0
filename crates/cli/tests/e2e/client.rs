//! What the tests say over HTTP, and what they hear.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::http::{HeaderMap, Request};

/// A client of one platform.
pub struct Client {
    agent: Agent,
    url: String,
}

/// An answer over HTTP.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
}

impl Client {
    /// A client for the platform at this port.
    pub fn new(port: u16) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .timeout_global(Some(Duration::from_secs(120)))
            .build();
        Self { agent: agent.into(), url: format!("http://127.0.0.1:{port}") }
    }

    /// Whether the platform answers.
    pub fn is_healthy(&self) -> bool {
        self.agent.get(format!("{}/v1/health", self.url)).call().is_ok_and(|r| r.status() == 200)
    }

    /// `GET`.
    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, b"")
    }

    /// `PUT` with a JSON body.
    pub fn put(&self, path: &str, body: &Value) -> Answer {
        self.send("PUT", path, body.to_string().as_bytes())
    }

    /// `POST`.
    pub fn post(&self, path: &str, body: &[u8]) -> Answer {
        self.send("POST", path, body)
    }

    /// `DELETE`.
    pub fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, b"")
    }

    /// Sends a request, which must be answered.
    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        self.try_send(method, path, body).unwrap_or_else(|e| panic!("{method} {path}: {e}"))
    }

    /// Sends a request that may stay without an answer.
    pub fn try_send(&self, method: &str, path: &str, body: &[u8]) -> Result<Answer, ureq::Error> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .body(body)
            .unwrap();
        let mut response = self.agent.run(request)?;
        let headers = response.headers().clone();
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(64 << 20).read_to_vec()?;
        Ok(Answer { status, headers, body })
    }
}

impl Answer {
    /// The body of an answer without an error, as JSON.
    #[track_caller]
    pub fn expect_ok(&self) -> Value {
        assert!((200..300).contains(&self.status), "{}: {}", self.status, self.text());
        assert_eq!(self.error(), None, "{}", self.text());
        self.json()
    }

    /// [`Answer::expect_ok`] of a request that found its sandbox in the state `start`.
    #[track_caller]
    pub fn expect_start(&self, start: &str) -> Value {
        let body = self.expect_ok();
        assert_eq!(self.start(), start, "{}", self.text());
        body
    }

    /// The document of a function that failed with an error of this type.
    #[track_caller]
    pub fn expect_error(&self, kind: &str) -> Value {
        assert_eq!((self.status, self.error()), (200, Some(kind)), "{}", self.text());
        let document = self.json();
        assert_eq!(document["errorType"], kind);
        document
    }

    /// The message of a refusal by the platform.
    #[track_caller]
    pub fn expect_refusal(&self, status: u16, code: &str) -> String {
        assert_eq!(self.status, status, "{}", self.text());
        let error = &self.json()["error"];
        assert_eq!(error["code"], code, "{}", self.text());
        error["message"].as_str().unwrap().to_owned()
    }

    /// The state in which the request found its sandbox.
    pub fn start(&self) -> &str {
        self.header("x-medes-start").unwrap_or("none")
    }

    /// The sandbox that served it.
    pub fn sandbox(&self) -> &str {
        self.header("x-medes-sandbox").unwrap_or("none")
    }

    /// The type of the function's error.
    pub fn error(&self) -> Option<&str> {
        self.header("x-medes-error")
    }

    /// After a restore: the pages that came back before and while the request ran.
    pub fn pages_back(&self) -> Option<u64> {
        let pages = |name| self.header(name)?.parse::<u64>().ok();
        Some(pages("x-medes-pages-before")? + pages("x-medes-pages-on-demand")?)
    }

    /// The body as JSON; null if there is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        if self.body.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
