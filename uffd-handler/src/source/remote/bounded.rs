//! Connections whose answers cannot fill this process's memory: of one that reports a failure only the beginning is taken in. The
//! length of all others is looked at before they are.

use async_trait::async_trait;
use futures_util::StreamExt;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpResponseBody, HttpService, ReqwestConnector,
};

/// How much of the body of a failure is taken in, in bytes. The codes of errors are in the first few hundred.
const FAILURE_BYTES: usize = 16 * 1024;

/// Makes such connections.
#[derive(Debug, Default)]
pub struct Connector(ReqwestConnector);

#[derive(Debug)]
struct Bounded(HttpClient);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Bounded(self.0.connect(options)?)))
    }
}

#[async_trait]
impl HttpService for Bounded {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = self.0.execute(request).await?.into_parts();
        let body = if parts.status.is_success() { body } else { beginning(body).await };
        Ok(HttpResponse::from_parts(parts, body))
    }
}

/// The beginning of a body, as far as it comes.
async fn beginning(body: HttpResponseBody) -> HttpResponseBody {
    let (mut stream, mut bytes) = (body.bytes_stream(), Vec::new());
    while let Some(Ok(part)) = stream.next().await {
        bytes.extend_from_slice(&part[..part.len().min(FAILURE_BYTES - bytes.len())]);
        if bytes.len() == FAILURE_BYTES {
            break;
        }
    }
    // What is cut in the middle of a character, or never was text, is no text.
    String::from_utf8_lossy(&bytes).into_owned().into()
}
