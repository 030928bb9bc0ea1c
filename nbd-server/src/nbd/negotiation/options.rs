//! What each option does and answers. Called by [`Negotiation`] with the whole
//! data of one option; decodes it (`decode`), changes the client's choices, and
//! appends the reply.

use bytes::BufMut;

use super::decode::{InfoRequest, Malformed, MetaRequest};
use super::{Agreed, Negotiation, Refusal, Step};
use crate::nbd::wire::{
    BASE_ALLOCATION, EXPORT_NAME_ZEROES, NBD_FLAG_SEND_DF, NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_MAX_STRING, NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME, NBD_OPT_GO, NBD_OPT_INFO, NBD_OPT_LIST, NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT, NBD_OPT_STRUCTURED_REPLY, NBD_OPTION_REPLY_MAGIC, NBD_REP_ACK,
    NBD_REP_ERR_INVALID, NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP, NBD_REP_INFO, NBD_REP_META_CONTEXT, NBD_REP_SERVER,
};

/// The id under which `base:allocation` is agreed. Not 0, which LIST uses.
const BASE_ALLOCATION_ID: u32 = 1;
/// The namespace of `base:allocation`, and the query for all that is in it.
const BASE_WILDCARD: &str = "base:";

/// What a client has chosen so far, apart from the export.
#[derive(Debug, Default)]
pub(super) struct Choices {
    structured_replies: bool,
    /// The export for which `base:allocation` was chosen last.
    pub(super) base_allocation_of: Option<usize>,
}

impl Negotiation {
    /// Works off one option. Returns a last word, if it was that.
    pub(super) fn handle_option(
        &mut self,
        option: u32,
        data: &[u8],
    ) -> Result<Option<Step>, Refusal> {
        if self.shutting_down && option != NBD_OPT_ABORT {
            return self.refuse_while_shutting_down(option);
        }
        match option {
            NBD_OPT_EXPORT_NAME => return self.handle_export_name(data).map(Some),
            NBD_OPT_ABORT => {
                self.reply(option, NBD_REP_ACK, &[]);
                return Ok(Some(Step::Ended));
            }
            NBD_OPT_LIST => self.handle_list(data),
            NBD_OPT_INFO | NBD_OPT_GO => return Ok(self.handle_info(option, data)),
            NBD_OPT_STRUCTURED_REPLY => self.handle_structured_reply(data),
            NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT => {
                self.handle_meta_context(option, data);
            }
            _ => self.reply(option, NBD_REP_ERR_UNSUP, b"option not supported"),
        }
        Ok(None)
    }

    /// Works off an option whose data was too long to look at.
    pub(super) fn handle_skipped_option(&mut self, option: u32) -> Result<Option<Step>, Refusal> {
        if self.shutting_down && option != NBD_OPT_ABORT {
            return self.refuse_while_shutting_down(option);
        }
        match option {
            NBD_OPT_EXPORT_NAME => Err(Refusal::ExportName("its name is too long")),
            NBD_OPT_LIST
            | NBD_OPT_INFO
            | NBD_OPT_GO
            | NBD_OPT_STRUCTURED_REPLY
            | NBD_OPT_LIST_META_CONTEXT
            | NBD_OPT_SET_META_CONTEXT => {
                if option == NBD_OPT_SET_META_CONTEXT {
                    self.choices.base_allocation_of = None;
                }
                self.reply(option, NBD_REP_ERR_TOO_BIG, b"option data too long");
                Ok(None)
            }
            // ABORT and unknown options do not look at their data anyway.
            _ => self.handle_option(option, &[]),
        }
    }

    fn refuse_while_shutting_down(&mut self, option: u32) -> Result<Option<Step>, Refusal> {
        if option == NBD_OPT_EXPORT_NAME {
            return Err(Refusal::ExportName("the server is shutting down"));
        }
        self.reply(option, NBD_REP_ERR_SHUTDOWN, b"server is shutting down");
        Ok(None)
    }

    fn handle_export_name(&mut self, data: &[u8]) -> Result<Step, Refusal> {
        if data.len() > NBD_MAX_STRING {
            return Err(Refusal::ExportName("its name is too long"));
        }
        let name = std::str::from_utf8(data)
            .map_err(|_| Refusal::ExportName("its name is not valid UTF-8"))?;
        let index = self
            .catalog
            .find(name)
            .ok_or_else(|| Refusal::UnknownExport(name.to_owned()))?;
        let agreed = self.agree(index);
        self.output.put_u64(self.catalog.exports()[index].size);
        self.output.put_u16(agreed.flags);
        if !self.no_zeroes {
            self.output.put_bytes(0, EXPORT_NAME_ZEROES);
        }
        Ok(Step::Done(agreed))
    }

    fn handle_list(&mut self, data: &[u8]) {
        if !data.is_empty() {
            return self.reply(NBD_OPT_LIST, NBD_REP_ERR_INVALID, b"LIST takes no data");
        }
        let catalog = self.catalog.clone();
        for export in catalog.exports() {
            let mut entry = Vec::with_capacity(4 + export.name.len() + export.description.len());
            entry.put_u32(export.name.len() as u32);
            entry.put_slice(export.name.as_bytes());
            entry.put_slice(export.description.as_bytes());
            self.reply(NBD_OPT_LIST, NBD_REP_SERVER, &entry);
        }
        self.reply(NBD_OPT_LIST, NBD_REP_ACK, &[]);
    }

    fn handle_structured_reply(&mut self, data: &[u8]) {
        if data.is_empty() {
            self.choices.structured_replies = true;
            self.reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, &[]);
        } else {
            self.reply(
                NBD_OPT_STRUCTURED_REPLY,
                NBD_REP_ERR_INVALID,
                b"STRUCTURED_REPLY takes no data",
            );
        }
    }

    fn handle_info(&mut self, option: u32, data: &[u8]) -> Option<Step> {
        let request = match InfoRequest::decode(data) {
            Ok(request) => request,
            Err(malformed) => {
                self.refuse_malformed(option, malformed);
                return None;
            }
        };
        let Some(index) = self.catalog.find(request.name) else {
            self.reply(option, NBD_REP_ERR_UNKNOWN, b"no such export");
            return None;
        };
        self.send_infos(option, index, &request);
        self.reply(option, NBD_REP_ACK, &[]);
        (option == NBD_OPT_GO).then(|| Step::Done(self.agree(index)))
    }

    fn send_infos(&mut self, option: u32, index: usize, request: &InfoRequest<'_>) {
        let catalog = self.catalog.clone();
        let export = &catalog.exports()[index];
        let flags = self.transmission_flags(index);
        self.send_info(option, NBD_INFO_EXPORT, |info| {
            info.put_u64(export.size);
            info.put_u16(flags);
        });
        if request.asks_for(NBD_INFO_NAME) {
            self.send_info(option, NBD_INFO_NAME, |info| {
                info.put_slice(export.name.as_bytes());
            });
        }
        if request.asks_for(NBD_INFO_DESCRIPTION) {
            self.send_info(option, NBD_INFO_DESCRIPTION, |info| {
                info.put_slice(export.description.as_bytes());
            });
        }
        // Unasked too: any client may know it, and none is held to it.
        self.send_info(option, NBD_INFO_BLOCK_SIZE, |info| {
            info.put_u32(export.block_size.minimum);
            info.put_u32(export.block_size.preferred);
            info.put_u32(export.block_size.maximum);
        });
    }

    fn send_info(&mut self, option: u32, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        let mut info = Vec::with_capacity(16);
        info.put_u16(kind);
        fill(&mut info);
        self.reply(option, NBD_REP_INFO, &info);
    }

    fn handle_meta_context(&mut self, option: u32, data: &[u8]) {
        let setting = option == NBD_OPT_SET_META_CONTEXT;
        if setting {
            // Even a SET that fails forgets what was chosen before.
            self.choices.base_allocation_of = None;
        }
        if !self.choices.structured_replies {
            let hint = b"metadata contexts need structured replies first";
            return self.reply(option, NBD_REP_ERR_INVALID, hint);
        }
        let request = match MetaRequest::decode(data) {
            Ok(request) => request,
            Err(malformed) => return self.refuse_malformed(option, malformed),
        };
        let Some(index) = self.catalog.find(request.export) else {
            return self.reply(option, NBD_REP_ERR_UNKNOWN, b"no such export");
        };
        // Every namespace and leaf that we do not know is ignored, as is the
        // wildcard while setting. Asked twice, answered once.
        let by_name = request.queries().any(|query| query == BASE_ALLOCATION);
        let by_wildcard = request.queries().any(|query| query == BASE_WILDCARD);
        let matched = by_name || (!setting && (by_wildcard || request.is_empty()));
        if matched {
            let id = if setting { BASE_ALLOCATION_ID } else { 0 };
            let mut context = Vec::with_capacity(4 + BASE_ALLOCATION.len());
            context.put_u32(id);
            context.put_slice(BASE_ALLOCATION.as_bytes());
            self.reply(option, NBD_REP_META_CONTEXT, &context);
        }
        if setting && matched {
            self.choices.base_allocation_of = Some(index);
        }
        self.reply(option, NBD_REP_ACK, &[]);
    }

    fn agree(&self, export: usize) -> Agreed {
        let chosen = self.choices.base_allocation_of == Some(export);
        Agreed {
            export,
            flags: self.transmission_flags(export),
            structured_replies: self.choices.structured_replies,
            base_allocation: chosen.then_some(BASE_ALLOCATION_ID),
        }
    }

    fn transmission_flags(&self, export: usize) -> u16 {
        let flags = self.catalog.exports()[export].flags;
        if self.choices.structured_replies {
            flags | NBD_FLAG_SEND_DF
        } else {
            flags
        }
    }

    fn refuse_malformed(&mut self, option: u32, malformed: Malformed) {
        match malformed {
            Malformed::Invalid(why) => self.reply(option, NBD_REP_ERR_INVALID, why.as_bytes()),
            Malformed::TooBig(why) => self.reply(option, NBD_REP_ERR_TOO_BIG, why.as_bytes()),
        }
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.output.put_u64(NBD_OPTION_REPLY_MAGIC);
        self.output.put_u32(option);
        self.output.put_u32(kind);
        self.output.put_u32(data.len() as u32);
        self.output.put_slice(data);
    }
}
