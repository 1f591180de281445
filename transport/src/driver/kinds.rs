//! The kinds of operations: how each starts, goes on, is withdrawn and ends.

use super::core::allocate_frame;
use super::messages::Sent;
use super::node::NodeShared;
use super::onesided::OneSided;
use super::op::{CoreRef, Kind, NodeRef, Started, Ticket};
use super::table::{RawSegment, Slot, Stage, What};
use crate::error::{Error, ErrorKind, Failed, Phase, Result};
use crate::memory::{Buffer, BufferMut};
use crate::message::Message;

/// See [`crate::Endpoint::send`].
pub struct Send {
    pub(crate) message: Option<Message>,
}

impl Kind for Send {
    type Output = Result<Message, Failed<Message>>;
    type Withdrawn = Message;
    const LAZY: bool = true;

    #[inline]
    fn prepare(&mut self, node: NodeRef<'_>) -> Result<()> {
        own_views(&mut self.message, node.0)
    }

    #[inline]
    fn try_now(&mut self, core: &mut CoreRef<'_>) -> Option<Started> {
        let sent = core.0.try_send(&mut self.message).transpose()?;
        Some(Send::started(sent))
    }

    fn start(&mut self, core: &mut CoreRef<'_>) -> Started {
        let sent = core.0.start_send(&mut self.message);
        Send::started(sent)
    }

    fn resume(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> Option<Result<()>> {
        let (result, mut slot) = core.0.state.ops.take_result(ticket.0)?;
        if let What::Send { message, .. } = &mut slot.what {
            self.message = message.take().map(|boxed| core.0.state.boxes.unwrap(boxed));
        }
        Some(result)
    }

    fn withdraw(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> bool {
        let state = &mut core.0.state;
        let Some(slot) = state.ops.get(ticket.0) else { return true };
        if !matches!(slot.stage, Stage::Queued) {
            return false;
        }
        state.unqueue_send(ticket.0);
        if let Some(Slot { what: What::Send { message, .. }, .. }) = state.ops.remove(ticket.0) {
            self.message = message.map(|boxed| state.boxes.unwrap(boxed));
        }
        true
    }

    fn abandon(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) {
        if self.withdraw(core, ticket) {
            return;
        }
        core.0.state.abandon_slot(ticket.0, None);
    }

    #[inline(always)]
    fn output(&mut self, result: Result<()>) -> Self::Output {
        match result {
            Ok(()) => Ok(self.message.take().unwrap_or_default()),
            Err(error) => Err(Failed { error, buffer: self.message.take() }),
        }
    }

    fn take_back(&mut self) -> Message {
        self.message.take().unwrap_or_default()
    }
}

impl Send {
    #[inline]
    fn started(sent: Result<Sent>) -> Started {
        match sent {
            Ok(Sent::Done) => Started::Over(Ok(())),
            Ok(Sent::Waits(id)) => Started::Waits(Ticket(id)),
            Err(error) => Started::Over(Err(error)),
        }
    }
}

/// What is sent must be ours: a view can lose its memory while it waits or is read by the link.
#[inline]
pub(crate) fn own_views(message: &mut Option<Message>, node: &NodeShared) -> Result<()> {
    match message {
        Some(message) if message.has_views() => {
            message.own_views(|len| allocate_frame(&*node.allocator, len))
        }
        _ => Ok(()),
    }
}

/// See [`crate::Endpoint::recv`].
#[derive(Default)]
pub struct Recv {
    message: Option<Message>,
}

impl Kind for Recv {
    type Output = Result<Message>;
    type Withdrawn = ();
    const LAZY: bool = true;
    const ANSWERED: bool = false;

    #[inline]
    fn try_now(&mut self, core: &mut CoreRef<'_>) -> Option<Started> {
        let core = &mut *core.0;
        if core.state.has_receivers() {
            return None;
        }
        if core.take_message(&mut self.message) {
            return Some(Started::Over(Ok(())));
        }
        core.state.refusal().map(|error| Started::Over(Err(error)))
    }

    fn start(&mut self, core: &mut CoreRef<'_>) -> Started {
        match self.try_now(core) {
            Some(started) => started,
            None => Started::Waits(Ticket(core.0.state.wait_for_message())),
        }
    }

    fn resume(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> Option<Result<()>> {
        let core = &mut *core.0;
        if core.state.is_first_receiver(ticket.0) && core.take_message(&mut self.message) {
            core.state.leave_line(ticket.0);
            return Some(Ok(()));
        }
        // Those before it in the line get what there is.
        if let Some(error) = core.state.refusal()
            && core.state.nothing_left_to_receive()
        {
            core.state.leave_line(ticket.0);
            return Some(Err(error));
        }
        None
    }

    fn withdraw(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> bool {
        core.0.state.leave_line(ticket.0);
        true
    }

    fn abandon(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) {
        self.withdraw(core, ticket);
    }

    #[inline(always)]
    fn output(&mut self, result: Result<()>) -> Self::Output {
        result.map(|()| self.message.take().unwrap_or_default())
    }

    fn take_back(&mut self) {}
}

/// What a tagged receive yields.
#[derive(Debug)]
pub struct Tagged<B> {
    /// The tag that the sender gave.
    pub tag: u64,
    /// How many bytes came; they are at the start of the buffer.
    pub len_bytes: usize,
    /// The buffer.
    pub buffer: B,
}

/// See [`crate::Endpoint::tag_send`].
pub struct TagSend<B> {
    pub(crate) tag: u64,
    pub(crate) buffer: Option<B>,
}

/// See [`crate::Endpoint::tag_recv`].
pub struct TagRecv<B> {
    pub(crate) tag: u64,
    pub(crate) mask: u64,
    pub(crate) buffer: Option<B>,
    /// Tag and length of what has come.
    pub(crate) came: (u64, usize),
}

/// See [`crate::Endpoint::put`].
pub struct Put<B> {
    pub(crate) key: u64,
    pub(crate) offset: u64,
    pub(crate) refused: Option<Error>,
    pub(crate) buffer: Option<B>,
}

/// See [`crate::Endpoint::get`].
pub struct Get<B> {
    pub(crate) key: u64,
    pub(crate) offset: u64,
    pub(crate) refused: Option<Error>,
    pub(crate) buffer: Option<B>,
}

impl<B> Unpin for TagSend<B> {}
impl<B> Unpin for TagRecv<B> {}
impl<B> Unpin for Put<B> {}
impl<B> Unpin for Get<B> {}

fn nothing_owned() -> Error {
    Error::new(ErrorKind::Cancelled, Phase::Transfer, "the operation no longer owns its buffer")
}

/// The buffer that an operation owned to its end.
fn owned<B>(buffer: &mut Option<B>) -> B {
    buffer.take().expect("an operation that is withdrawn, or has ended well, owns its buffer")
}

/// What an operation yields that is all about its buffer.
fn buffer_back<B>(buffer: &mut Option<B>, result: Result<()>) -> Result<B, Failed<B>> {
    match result {
        Ok(()) => Ok(owned(buffer)),
        Err(error) => Err(Failed { error, buffer: buffer.take() }),
    }
}

impl<B: Buffer> Kind for TagSend<B> {
    type Output = Result<B, Failed<B>>;
    type Withdrawn = B;

    fn start(&mut self, core: &mut CoreRef<'_>) -> Started {
        let Some(buffer) = &self.buffer else {
            return Started::Over(Err(nothing_owned()));
        };
        match core.0.start_tag_send(self.tag, RawSegment::from(buffer.region())) {
            Ok(None) => Started::Over(Ok(())),
            Ok(Some(id)) => Started::Waits(Ticket(id)),
            Err(error) => Started::Over(Err(error)),
        }
    }

    fn withdraw(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> bool {
        core.0.state.withdraw_tag_send(ticket.0)
    }

    fn abandon(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) {
        if !self.withdraw(core, ticket) {
            core.0.state.abandon_slot(ticket.0, self.buffer.take().map(|b| Box::new(b) as _));
        }
    }

    fn output(&mut self, result: Result<()>) -> Self::Output {
        buffer_back(&mut self.buffer, result)
    }

    fn take_back(&mut self) -> B {
        owned(&mut self.buffer)
    }
}

impl<B: BufferMut> Kind for TagRecv<B> {
    type Output = Result<Tagged<B>, Failed<B>>;
    type Withdrawn = B;

    fn start(&mut self, core: &mut CoreRef<'_>) -> Started {
        let Some(buffer) = &mut self.buffer else {
            return Started::Over(Err(nothing_owned()));
        };
        let to = RawSegment::from(buffer.region_mut());
        match core.0.start_tag_recv(self.tag, self.mask, to) {
            Ok(id) => Started::Waits(Ticket(id)),
            Err(error) => Started::Over(Err(error)),
        }
    }

    fn resume(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> Option<Result<()>> {
        let (result, slot) = core.0.state.ops.take_result(ticket.0)?;
        Some(match (result, slot.what) {
            (Ok(()), What::TagRecv { matched: Some(matched), .. }) => {
                self.came = (matched.tag, matched.len);
                Ok(())
            }
            (Ok(()), _) => Err(nothing_owned()),
            (Err(error), _) => Err(error),
        })
    }

    fn withdraw(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> bool {
        let withdrawn = core.0.state.withdraw_tag_recv(ticket.0);
        core.0.flush();
        withdrawn
    }

    fn abandon(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) {
        if let Some(buffer) = self.buffer.take() {
            core.0.state.abandon_tag_recv(ticket.0, Box::new(buffer));
        }
    }

    fn output(&mut self, result: Result<()>) -> Self::Output {
        let (tag, len_bytes) = self.came;
        buffer_back(&mut self.buffer, result).map(|buffer| Tagged { tag, len_bytes, buffer })
    }

    fn take_back(&mut self) -> B {
        owned(&mut self.buffer)
    }
}

impl<B: Buffer> Kind for Put<B> {
    type Output = Result<B, Failed<B>>;
    type Withdrawn = B;

    fn start(&mut self, core: &mut CoreRef<'_>) -> Started {
        if let Some(error) = self.refused.take() {
            return Started::Over(Err(error));
        }
        let Some(buffer) = &self.buffer else {
            return Started::Over(Err(nothing_owned()));
        };
        let from = RawSegment::from(buffer.region());
        match core.0.start_one_sided(OneSided::Put { from, key: self.key, offset: self.offset }) {
            Ok(id) => Started::Waits(Ticket(id)),
            Err(error) => Started::Over(Err(error)),
        }
    }

    fn withdraw(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> bool {
        core.0.state.withdraw_one_sided(ticket.0)
    }

    fn abandon(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) {
        if !self.withdraw(core, ticket) {
            core.0.state.abandon_slot(ticket.0, self.buffer.take().map(|b| Box::new(b) as _));
        }
    }

    fn output(&mut self, result: Result<()>) -> Self::Output {
        buffer_back(&mut self.buffer, result)
    }

    fn take_back(&mut self) -> B {
        owned(&mut self.buffer)
    }
}

impl<B: BufferMut> Kind for Get<B> {
    type Output = Result<B, Failed<B>>;
    type Withdrawn = B;

    fn start(&mut self, core: &mut CoreRef<'_>) -> Started {
        if let Some(error) = self.refused.take() {
            return Started::Over(Err(error));
        }
        let Some(buffer) = &mut self.buffer else {
            return Started::Over(Err(nothing_owned()));
        };
        let to = RawSegment::from(buffer.region_mut());
        match core.0.start_one_sided(OneSided::Get { to, key: self.key, offset: self.offset }) {
            Ok(id) => Started::Waits(Ticket(id)),
            Err(error) => Started::Over(Err(error)),
        }
    }

    fn withdraw(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> bool {
        core.0.state.withdraw_one_sided(ticket.0)
    }

    fn abandon(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) {
        if !self.withdraw(core, ticket) {
            core.0.state.abandon_slot(ticket.0, self.buffer.take().map(|b| Box::new(b) as _));
        }
    }

    fn output(&mut self, result: Result<()>) -> Self::Output {
        buffer_back(&mut self.buffer, result)
    }

    fn take_back(&mut self) -> B {
        owned(&mut self.buffer)
    }
}

/// See [`crate::Endpoint::fence`].
pub struct Fence;

impl Kind for Fence {
    type Output = Result<()>;
    type Withdrawn = ();

    fn start(&mut self, core: &mut CoreRef<'_>) -> Started {
        match core.0.start_fence() {
            Ok(id) => Started::Waits(Ticket(id)),
            Err(error) => Started::Over(Err(error)),
        }
    }

    fn withdraw(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> bool {
        self.abandon(core, ticket);
        true
    }

    fn abandon(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) {
        core.0.state.abandon_slot(ticket.0, None);
    }

    fn output(&mut self, result: Result<()>) -> Self::Output {
        result
    }

    fn take_back(&mut self) {}
}
