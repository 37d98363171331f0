//! Reading request bodies of limited length.

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

/// How much of a body that is too long is read and thrown away, bytes. A client that is still
/// sending would see its connection break instead of the answer that says what is wrong.
const DISCARDED: usize = 64 << 20;

/// Why a body could not be read.
#[derive(Debug)]
pub(crate) enum BodyError {
    /// It is longer than allowed.
    TooLong,
    /// The connection failed.
    Broken(String),
}

/// Reads a whole body of at most `limit` bytes.
pub(crate) async fn read(mut body: Body, limit: usize) -> Result<Bytes, BodyError> {
    let mut whole = BytesMut::new();
    let mut length = 0usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| BodyError::Broken(e.to_string()))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if length <= limit {
            whole.extend_from_slice(&data);
        } else if length > limit.saturating_add(DISCARDED) {
            break;
        } else {
            whole = BytesMut::new();
        }
    }
    if length > limit { Err(BodyError::TooLong) } else { Ok(whole.freeze()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_limit_is_exact() {
        let body = |n: usize| Body::from(vec![1u8; n]);
        assert_eq!(read(body(10), 10).await.unwrap().len(), 10);
        assert!(matches!(read(body(11), 10).await, Err(BodyError::TooLong)));
        assert!(read(Body::empty(), 0).await.unwrap().is_empty());
    }
}
