//! AWS Lambda's Runtime API (version 2018-06-01), the side that the vendor's runtimes talk to.
//!
//! A runtime asks for work with a `GET …/invocation/next` that blocks until there is some, and
//! posts the answer. That blocked connection is the runtime's life: every vendor's runtime exits
//! when it is closed and crashes when it is answered with anything but a request. So it is held by
//! a process that outlives the platform's daemon, and it is never answered without a request.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use medes_core::RequestId;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};

/// The longest answer of a synchronous request, bytes (6 MiB and 100 bytes, as on AWS).
pub const MAX_RESPONSE: usize = 6 * 1024 * 1024 + 100;

/// The longest request head that a runtime may send. Lambda's runtimes put an error's cause into
/// a header of up to 1 MiB.
const MAX_HEAD: usize = 2 * 1024 * 1024;

/// One request as a runtime sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// The request's identifier.
    pub id: RequestId,
    /// When the function must have answered, milliseconds since 1970.
    pub deadline_ms: u64,
    /// The function's ARN.
    pub arn: String,
    /// The payload.
    pub payload: Bytes,
    /// Lambda's client context (JSON).
    pub client_context: Option<String>,
    /// The trace header.
    pub trace: Option<String>,
}

/// What a runtime did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum RuntimeEvent {
    /// It waits for a request.
    Waiting,
    /// It could not initialise; it will exit.
    InitError {
        /// The runtime's error document (JSON).
        payload: Bytes,
    },
    /// It answered a request.
    Response {
        /// The request.
        request: RequestId,
        /// The answer.
        payload: Bytes,
    },
    /// The function failed at a request.
    Error {
        /// The request.
        request: RequestId,
        /// The runtime's error document (JSON).
        payload: Bytes,
    },
    /// The answer was longer than [`MAX_RESPONSE`] and was not taken.
    TooLarge {
        /// The request.
        request: RequestId,
        /// The length that the runtime announced, or where reading stopped, bytes.
        bytes: u64,
    },
}

/// The Runtime API of one sandbox. One request at a time.
pub struct LambdaApi {
    slot: Mutex<Slot>,
    wake: Notify,
    events: mpsc::UnboundedSender<RuntimeEvent>,
}

#[derive(Default)]
struct Slot {
    queued: Option<Request>,
    current: Option<RequestId>,
    /// How many `/next` calls are blocked; more than one only if the function's own code asks.
    waiting: u32,
}

/// The sandbox has a request already
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the sandbox has a request already")]
pub struct Busy;

impl LambdaApi {
    /// A new API that reports to `events`.
    #[must_use]
    pub fn new(events: mpsc::UnboundedSender<RuntimeEvent>) -> Arc<Self> {
        Arc::new(Self { slot: Mutex::default(), wake: Notify::new(), events })
    }

    /// Hands a request to the runtime, at once if it waits for one, else when it asks.
    ///
    /// # Errors
    /// [`Busy`] while an earlier request is unanswered.
    pub fn send(&self, request: Request) -> Result<(), Busy> {
        let mut slot = self.lock();
        if slot.queued.is_some() || slot.current.is_some() {
            return Err(Busy);
        }
        slot.queued = Some(request);
        drop(slot);
        self.wake.notify_one();
        Ok(())
    }

    /// Whether the runtime is blocked in `/next` with nothing to do.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let slot = self.lock();
        slot.waiting > 0 && slot.queued.is_none() && slot.current.is_none()
    }

    /// Serves the API on `listener` until the task is dropped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Only passing causes (no descriptors, a connection reset in the queue).
                    tracing::warn!(%error, "accepting a runtime's connection");
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    continue;
                }
            };
            // Without it head and body of an answer may wait 40 ms for a delayed acknowledgement.
            let _ = stream.set_nodelay(true);
            let api = Arc::clone(&self);
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let api = Arc::clone(&api);
                    async move { Ok::<_, Infallible>(api.answer(request).await) }
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .max_buf_size(MAX_HEAD)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "a runtime's connection ended");
                }
            });
        }
    }

    async fn answer(&self, request: hyper::Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let Some(rest) = path.strip_prefix("/2018-06-01/") else {
            return match path.as_str() {
                "/ping" => plain(StatusCode::OK, "pong"),
                _ => refuse(StatusCode::NOT_FOUND, "NotFound", "no such path in the Runtime API"),
            };
        };
        let parts: Vec<&str> = rest.trim_end_matches('/').split('/').collect();
        match (request.method(), parts.as_slice()) {
            (&Method::GET, ["runtime", "invocation", "next"]) => self.next().await,
            (&Method::POST, ["runtime", "init", "error"]) => self.init_error(request).await,
            (&Method::POST, ["runtime", "invocation", id, what @ ("response" | "error")]) => {
                let (id, is_error) = ((*id).to_owned(), *what == "error");
                self.finish(&id, is_error, request).await
            }
            (&Method::GET, ["ping"]) => plain(StatusCode::OK, "pong"),
            _ => refuse(StatusCode::NOT_FOUND, "NotFound", "no such path in the Runtime API"),
        }
    }

    async fn next(&self) -> Response<Full<Bytes>> {
        let _guard = WaitingGuard::new(self);
        loop {
            // Made before the slot is looked at, so that no wake-up falls in between.
            let woken = self.wake.notified();
            {
                let mut slot = self.lock();
                if let Some(request) = slot.queued.take() {
                    slot.current = Some(request.id);
                    return deliver(request);
                }
            }
            woken.await;
        }
    }

    async fn init_error(&self, request: hyper::Request<Incoming>) -> Response<Full<Bytes>> {
        let payload = match Limited::new(request.into_body(), MAX_RESPONSE).collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => Bytes::from_static(b"{}"),
        };
        self.report(RuntimeEvent::InitError { payload });
        accepted()
    }

    async fn finish(
        &self,
        id: &str,
        is_error: bool,
        request: hyper::Request<Incoming>,
    ) -> Response<Full<Bytes>> {
        let known = id.parse::<RequestId>().ok().filter(|id| self.lock().current == Some(*id));
        let Some(id) = known else {
            return refuse(StatusCode::BAD_REQUEST, "InvalidRequestID", "Invalid request ID");
        };
        let announced = request
            .headers()
            .get(hyper::header::CONTENT_LENGTH)
            .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        let body = Limited::new(request.into_body(), MAX_RESPONSE).collect().await;
        let event = match body {
            Ok(body) if is_error => RuntimeEvent::Error { request: id, payload: body.to_bytes() },
            Ok(body) => RuntimeEvent::Response { request: id, payload: body.to_bytes() },
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                let bytes = announced.unwrap_or(MAX_RESPONSE as u64 + 1);
                self.settle(id);
                self.report(RuntimeEvent::TooLarge { request: id, bytes });
                return refuse(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "RequestEntityTooLarge",
                    "Exceeded maximum allowed payload size (6291556 bytes).",
                );
            }
            Err(_) => {
                return refuse(StatusCode::BAD_REQUEST, "BrokenBody", "the body was cut short");
            }
        };
        self.settle(id);
        self.report(event);
        accepted()
    }

    fn settle(&self, id: RequestId) {
        let mut slot = self.lock();
        if slot.current == Some(id) {
            slot.current = None;
        }
    }

    fn report(&self, event: RuntimeEvent) {
        // Nobody listens any more only when the sandbox is being taken down.
        let _ = self.events.send(event);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Counts a blocked `/next`, also when its connection is dropped.
struct WaitingGuard<'a>(&'a LambdaApi);

impl<'a> WaitingGuard<'a> {
    fn new(api: &'a LambdaApi) -> Self {
        api.lock().waiting += 1;
        api.report(RuntimeEvent::Waiting);
        Self(api)
    }
}

impl Drop for WaitingGuard<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
        // A wake-up that this call took but did not use belongs to the next one.
        if self.0.lock().queued.is_some() {
            self.0.wake.notify_one();
        }
    }
}

fn deliver(request: Request) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(request.payload));
    let headers = response.headers_mut();
    let mut set = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    set("content-type", "application/json");
    set("lambda-runtime-aws-request-id", &request.id.to_string());
    set("lambda-runtime-deadline-ms", &request.deadline_ms.to_string());
    set("lambda-runtime-invoked-function-arn", &request.arn);
    if let Some(trace) = &request.trace {
        set("lambda-runtime-trace-id", trace);
    }
    if let Some(context) = &request.client_context {
        set("lambda-runtime-client-context", context);
    }
    response
}

fn accepted() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(b"{\"status\":\"OK\"}\n")));
    *response.status_mut() = StatusCode::ACCEPTED;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response
}

fn refuse(status: StatusCode, kind: &str, message: &str) -> Response<Full<Bytes>> {
    let body = serde_json::json!({ "errorType": kind, "errorMessage": message }).to_string();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The deadline of a request that may run `timeout_ms` from now, milliseconds since 1970.
#[must_use]
pub fn deadline_ms(timeout_ms: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX).saturating_add(timeout_ms)
}
