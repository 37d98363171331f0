//! Web pages may not drive the platform.
//!
//! A loopback address keeps other machines out, but not the pages that a browser on this machine
//! shows: any of them can post to `http://127.0.0.1:9400`. Browsers name the page's origin with
//! such requests, other clients send none.

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;

/// Lets a request pass unless it comes from a page that this server did not serve itself.
pub(crate) async fn refuse_foreign_pages(request: Request, next: Next) -> Response {
    if is_foreign(request.headers()) {
        let message = "requests from web pages of other origins are not served";
        return ApiError::new(StatusCode::FORBIDDEN, "ForeignOrigin", message).into_response();
    }
    next.run(request).await
}

fn is_foreign(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let own = || {
        let host = headers.get(header::HOST)?.to_str().ok()?;
        let (_, page) = origin.to_str().ok()?.split_once("://")?;
        // A name could be one that its owner has pointed at this machine.
        let authority: axum::http::uri::Authority = host.parse().ok()?;
        let name = authority.host().trim_matches(['[', ']']);
        let ours = name == "localhost" || name.parse::<std::net::IpAddr>().is_ok();
        Some(ours && page == host)
    };
    !own().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_pages_and_clients_that_are_no_browsers_pass() {
        for (host, origin, foreign) in [
            ("127.0.0.1:9400", None, false),
            ("medes.example", None, false),
            ("127.0.0.1:9400", Some("http://127.0.0.1:9400"), false),
            ("[::1]:9400", Some("http://[::1]:9400"), false),
            ("localhost:9400", Some("http://localhost:9400"), false),
            ("127.0.0.1:9400", Some("https://evil.example"), true),
            ("127.0.0.1:9400", Some("null"), true),
            ("127.0.0.1:9400", Some("http://127.0.0.1:8000"), true),
            ("rebound.example:9400", Some("http://rebound.example:9400"), true),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().unwrap());
            }
            assert_eq!(is_foreign(&headers), foreign, "{host} {origin:?}");
        }
    }
}
