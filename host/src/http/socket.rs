//! A connection's socket, which can be taken out of hyper's hands.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Handles share the socket; it closes with the last of them. Only one of them is to be used at a time.
#[derive(Clone)]
pub struct Socket(Arc<Inner>);

struct Inner {
    stream: TcpStream,
    /// The last write was not taken whole: whoever made it has more to send.
    blocked: AtomicBool,
}

impl Socket {
    pub fn new(stream: TcpStream) -> Socket {
        Socket(Arc::new(Inner { stream, blocked: AtomicBool::new(false) }))
    }

    /// Breaks the connection when what was sent has not arrived for so long: the client's machine is gone, or its network.
    /// Left to itself the kernel tries for a quarter of an hour.
    pub fn give_up_after(&self, time: Duration) -> io::Result<()> {
        SockRef::from(&self.0.stream).set_tcp_user_timeout(Some(time))
    }

    pub fn is_blocked(&self) -> bool {
        self.0.blocked.load(Ordering::Acquire)
    }

    /// Bytes that the socket takes at once, be it none.
    pub fn try_write(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.0.stream.try_write_vectored(bufs) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    /// Resolves when the client has closed the connection, or it broke (`Err`). What the client still sends is thrown away.
    pub async fn closed(&self) -> io::Result<()> {
        poll_fn(|cx| {
            let mut unread = [0; 256];
            loop {
                ready!(self.0.stream.poll_read_ready(cx))?;
                match self.0.stream.try_read(&mut unread) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Poll::Ready(Err(error)),
                    Ok(0) => return Poll::Ready(Ok(())),
                    Ok(_) => {}
                }
            }
        })
        .await
    }

    fn write(
        &self,
        cx: &mut Context<'_>,
        offered: usize,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let Inner { stream, blocked } = &*self.0;
        let result = loop {
            match stream.poll_write_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
            match write(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => break Poll::Ready(result),
            }
        };
        blocked.store(!matches!(result, Poll::Ready(Ok(taken)) if taken >= offered), Ordering::Release);
        result
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.stream.poll_read_ready(cx))?;
            match self.0.stream.try_read(buf.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, buf.len(), |stream| stream.try_write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, bufs.iter().map(|buf| buf.len()).sum(), |stream| stream.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(&self.0.stream).shutdown(Shutdown::Write))
    }
}
