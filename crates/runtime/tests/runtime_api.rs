//! The Runtime API as a runtime sees it, over a real connection.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request as HttpRequest, StatusCode};
use hyper_util::rt::TokioIo;
use medes_core::RequestId;
use medes_runtime::{LambdaApi, Request, RuntimeEvent};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

struct Runtime(hyper::client::conn::http1::SendRequest<Full<Bytes>>);

impl Runtime {
    async fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("speaks");
        tokio::spawn(connection);
        Self(sender)
    }

    async fn call(
        &mut self,
        method: Method,
        path: &str,
        body: &[u8],
    ) -> (StatusCode, String, Bytes) {
        let request = HttpRequest::builder()
            .method(method)
            .uri(format!("/2018-06-01/runtime/{path}"))
            .body(Full::new(Bytes::copy_from_slice(body)))
            .expect("a request");
        self.0.ready().await.expect("open");
        let response = self.0.send_request(request).await.expect("an answer");
        let id = response
            .headers()
            .get("lambda-runtime-aws-request-id")
            .map(|v| v.to_str().expect("text").to_owned())
            .unwrap_or_default();
        let status = response.status();
        (status, id, response.into_body().collect().await.expect("a body").to_bytes())
    }
}

async fn start() -> (std::sync::Arc<LambdaApi>, mpsc::UnboundedReceiver<RuntimeEvent>, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let (events, received) = mpsc::unbounded_channel();
    let api = LambdaApi::new(events);
    tokio::spawn(std::sync::Arc::clone(&api).serve(listener));
    (api, received, port)
}

fn request(payload: &str) -> Request {
    Request {
        id: RequestId::random(),
        deadline_ms: 1,
        arn: "arn:aws:lambda:us-east-1:000000000000:function:f".into(),
        payload: Bytes::copy_from_slice(payload.as_bytes()),
        client_context: None,
        trace: None,
    }
}

#[tokio::test]
async fn a_request_reaches_the_runtime_and_its_answer_comes_back() {
    let (api, mut events, port) = start().await;
    let mut runtime = Runtime::connect(port).await;
    for n in 0..3 {
        let sent = request(&format!("{{\"n\":{n}}}"));
        let (next, ()) = tokio::join!(runtime.call(Method::GET, "invocation/next", b""), async {
            assert_eq!(events.recv().await, Some(RuntimeEvent::Waiting));
            assert!(api.is_idle());
            api.send(sent.clone()).expect("free");
            assert_eq!(api.send(sent.clone()), Err(medes_runtime::lambda::Busy));
        });
        assert_eq!((next.0, next.1.as_str()), (StatusCode::OK, sent.id.to_string().as_str()));
        assert_eq!(next.2, sent.payload);
        assert!(!api.is_idle());
        let path = format!("invocation/{}/response", sent.id);
        assert_eq!(runtime.call(Method::POST, &path, b"42").await.0, StatusCode::ACCEPTED);
        let expected =
            RuntimeEvent::Response { request: sent.id, payload: Bytes::from_static(b"42") };
        assert_eq!(events.recv().await, Some(expected));
        // The same answer again is not taken.
        assert_eq!(runtime.call(Method::POST, &path, b"42").await.0, StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn a_request_survives_a_runtime_that_hangs_up_while_waiting() {
    let (api, mut events, port) = start().await;
    let mut first = Runtime::connect(port).await;
    let waiting = tokio::spawn(async move {
        first.call(Method::GET, "invocation/next", b"").await;
    });
    assert_eq!(events.recv().await, Some(RuntimeEvent::Waiting));
    waiting.abort();
    let _ = waiting.await;
    while api.is_idle() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let sent = request("{}");
    api.send(sent.clone()).expect("free");
    let mut second = Runtime::connect(port).await;
    let got = tokio::time::timeout(
        std::time::Duration::from_secs(5),
        second.call(Method::GET, "invocation/next", b""),
    );
    assert_eq!(got.await.expect("in time").1, sent.id.to_string());
}

#[tokio::test]
async fn errors_and_oversized_answers_are_told_apart() {
    let (api, mut events, port) = start().await;
    let mut runtime = Runtime::connect(port).await;
    let sent = request("{}");
    api.send(sent.clone()).expect("free");
    runtime.call(Method::GET, "invocation/next", b"").await;
    events.recv().await;
    let path = format!("invocation/{}", sent.id);
    runtime.call(Method::POST, &format!("{path}/error"), b"{\"errorType\":\"E\"}").await;
    assert!(matches!(events.recv().await, Some(RuntimeEvent::Error { .. })));

    let sent = request("{}");
    api.send(sent.clone()).expect("free");
    runtime.call(Method::GET, "invocation/next", b"").await;
    events.recv().await;
    let long = vec![b'x'; medes_runtime::lambda::MAX_RESPONSE + 1];
    let path = format!("invocation/{}/response", sent.id);
    assert_eq!(runtime.call(Method::POST, &path, &long).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    let expected = RuntimeEvent::TooLarge { request: sent.id, bytes: long.len() as u64 };
    assert_eq!(events.recv().await, Some(expected));

    let mut failing = Runtime::connect(port).await;
    let answer = failing.call(Method::POST, "init/error", b"{\"errorType\":\"X\"}").await;
    assert_eq!(answer.0, StatusCode::ACCEPTED);
    assert!(matches!(events.recv().await, Some(RuntimeEvent::InitError { .. })));
}
