//! The client of the platform's native HTTP API.

use std::io::Read;
use std::time::Duration;

use medes_core::{FunctionName, MemoryReturn, RequestId, SandboxId, StartKind, Timing};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::http::{Method, Request, Response, StatusCode};
use ureq::{Agent, Body};

use crate::wire::ErrorBody;

/// Where the platform listens unless told otherwise.
pub const DEFAULT_URL: &str = "http://127.0.0.1:9400";

/// The longest answer that is taken in one piece; far above the platform's own limit.
const LONGEST_ANSWER: u64 = 1 << 30;

/// A call to the platform failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The URL can't be one of a platform.
    #[error("{0:?} is no platform URL; it looks like {DEFAULT_URL}")]
    BadUrl(String),
    /// Nothing answers there.
    #[error("cannot reach the platform at {url}: {cause}; is `medes serve` running?")]
    Unreachable {
        /// The platform's URL.
        url: String,
        /// What stood in the way.
        cause: String,
    },
    /// The platform answered with an error.
    #[error("{message} ({code})")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// A stable name such as `NoSuchFunction`.
        code: String,
        /// What went wrong and the way out.
        message: String,
    },
    /// The answer is not one of this API.
    #[error("{url} gave an answer that is not the platform's: {cause}; another service there?")]
    Foreign {
        /// What was called.
        url: String,
        /// What is wrong with the answer.
        cause: String,
    },
}

/// A function's answer.
#[derive(Debug)]
pub struct Answer {
    /// The request's identifier.
    pub request: Option<RequestId>,
    /// The sandbox that served it.
    pub sandbox: Option<SandboxId>,
    /// The state in which the request found it.
    pub start: Option<StartKind>,
    /// Where the time went.
    pub timing: Timing,
    /// How its memory came back, if the request found its sandbox in the dedup state.
    pub memory: Option<MemoryReturn>,
    /// The error's type if `payload` is an error document.
    pub error: Option<String>,
    /// The answer or the error document.
    pub payload: Vec<u8>,
}

/// A connection pool to one platform; clones share it.
#[derive(Clone, Debug)]
pub struct Client {
    agent: Agent,
    url: String,
    /// Say on standard error what is called.
    verbose: bool,
}

impl Client {
    /// A client for the platform at `url`, such as `http://127.0.0.1:9400`.
    ///
    /// # Errors
    /// If `url` is not an `http://` URL with a host.
    pub fn new(url: &str) -> Result<Self, ClientError> {
        let bad = || ClientError::BadUrl(url.to_owned());
        let parsed: ureq::http::Uri = url.parse().map_err(|_| bad())?;
        if parsed.scheme_str() != Some("http") || parsed.query().is_some() {
            return Err(bad());
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // A proxy for the outside world knows nothing of a platform on loopback.
            .proxy(None)
            .max_redirects(0)
            // As many as the demo has requests under way, so that none waits for a connection.
            .max_idle_connections(256)
            .max_idle_connections_per_host(256)
            .timeout_connect(Some(Duration::from_secs(10)))
            .user_agent(concat!("medes/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Ok(Self { agent, url: url.trim_end_matches('/').to_owned(), verbose: false })
    }

    /// The same client, saying on standard error what it calls.
    #[must_use]
    pub fn verbose(self, verbose: bool) -> Self {
        Self { verbose, ..self }
    }

    /// The platform's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether the platform is on this machine, so that it sees the same directories.
    pub fn is_local(&self) -> bool {
        let uri: ureq::http::Uri = self.url.parse().unwrap_or_default();
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// `GET path`, decoded.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None)
    }

    /// `PUT path` with a JSON body, decoded.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.foreign(path, &e))?;
        self.call(Method::PUT, path, Some(body))
    }

    /// `POST path` without a body, decoded.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::POST, path, Some(Vec::new()))
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.call::<Value>(Method::DELETE, path, None).map(|_| ())
    }

    /// `GET path` as a stream that may never end.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub fn stream(&self, path: &str) -> Result<impl Read + use<>, ClientError> {
        Ok(self.send(Method::GET, path, None)?.into_body().into_reader())
    }

    /// Sends a request to a function. An error of the function's own is an [`Answer`] too.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub fn invoke(&self, function: &FunctionName, payload: &[u8]) -> Result<Answer, ClientError> {
        let path = format!("/v1/functions/{function}/invoke");
        let response = self.send(Method::POST, &path, Some(payload.to_vec()))?;
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        let number = |name: &str| header(name).and_then(|v| v.parse().ok()).unwrap_or(0);
        let start = match header("x-medes-start") {
            Some("cold") => Some(StartKind::Cold),
            Some("warm") => Some(StartKind::Warm),
            Some("dedup") => Some(StartKind::Dedup),
            _ => None,
        };
        let mut answer = Answer {
            request: header("x-medes-request").and_then(|v| v.parse().ok()),
            sandbox: header("x-medes-sandbox").and_then(|v| v.parse().ok()),
            start,
            timing: Timing {
                queue_us: number("x-medes-queue-us"),
                startup_us: number("x-medes-startup-us"),
                execution_us: number("x-medes-execution-us"),
                total_us: number("x-medes-total-us"),
            },
            memory: header("x-medes-pages-before").is_some().then(|| MemoryReturn {
                pages_before: number("x-medes-pages-before"),
                prefetch_us: number("x-medes-prefetch-us"),
                thaw_us: number("x-medes-thaw-us"),
                faults: number("x-medes-faults"),
                pages_on_demand: number("x-medes-pages-on-demand"),
            }),
            error: header("x-medes-error").map(str::to_owned),
            payload: Vec::new(),
        };
        answer.payload = self.body(&path, response)?;
        Ok(answer)
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, ClientError> {
        let response = self.send(method, path, body)?;
        let body = self.body(path, response)?;
        let text: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(text).map_err(|e| self.foreign(path, &e))
    }

    fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Body>, ClientError> {
        if self.verbose {
            eprintln!("medes: {method} {}{path}", self.url);
        }
        let request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        let result = match body {
            Some(body) => request
                .header("content-type", "application/json")
                .body(body)
                .map(|r| self.agent.run(r)),
            None => request.body(()).map(|r| self.agent.run(r)),
        };
        let response = result
            .map_err(|_| ClientError::BadUrl(self.url.clone()))?
            .map_err(|e| self.unreachable(&e))?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(self.refusal(path, response))
        }
    }

    fn refusal(&self, path: &str, response: Response<Body>) -> ClientError {
        let status = response.status();
        let body = match self.body(path, response) {
            Ok(body) => body,
            Err(e) => return e,
        };
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error }) => ClientError::Refused {
                status: status.as_u16(),
                code: error.code,
                message: error.message,
            },
            Err(_) if status == StatusCode::PAYLOAD_TOO_LARGE => ClientError::Refused {
                status: status.as_u16(),
                code: "PayloadTooLarge".into(),
                message: "the platform takes no request that large".into(),
            },
            Err(_) => self.foreign(path, &format_args!("HTTP status {status}")),
        }
    }

    fn body(&self, path: &str, mut response: Response<Body>) -> Result<Vec<u8>, ClientError> {
        match response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_vec() {
            Ok(body) => Ok(body),
            Err(ureq::Error::BodyExceedsLimit(_)) => Err(self.foreign(path, &"it has no end")),
            Err(e) => Err(self.unreachable(&e)),
        }
    }

    fn unreachable(&self, e: &ureq::Error) -> ClientError {
        use std::io::ErrorKind;
        let cause = match e {
            ureq::Error::Io(e) => match e.kind() {
                ErrorKind::ConnectionRefused => "connection refused".to_owned(),
                ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => {
                    "it closed the connection without an answer".to_owned()
                }
                _ => e.to_string(),
            },
            ureq::Error::ConnectionFailed => "connection refused".to_owned(),
            ureq::Error::HostNotFound => "no such host".to_owned(),
            e => e.to_string(),
        };
        ClientError::Unreachable { url: self.url.clone(), cause }
    }

    fn foreign(&self, path: &str, cause: &dyn std::fmt::Display) -> ClientError {
        ClientError::Foreign { url: format!("{}{path}", self.url), cause: cause.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_http_urls_are_taken() {
        for good in ["http://127.0.0.1:9400", "http://localhost:9400/", "http://[::1]:1"] {
            assert!(Client::new(good).is_ok(), "{good}");
        }
        for bad in ["", "127.0.0.1:9400", "https://x", "ftp://x", "http://", "http://x?y=1"] {
            assert!(matches!(Client::new(bad), Err(ClientError::BadUrl(_))), "{bad}");
        }
    }

    #[test]
    fn loopback_platforms_see_the_same_directories() {
        for (url, local) in [
            ("http://127.0.0.1:9400", true),
            ("http://localhost:1", true),
            ("http://[::1]:1", true),
            ("http://192.0.2.1:9400", false),
            ("http://node:9400", false),
        ] {
            assert_eq!(Client::new(url).unwrap().is_local(), local, "{url}");
        }
    }
}
